// The kernels, as Python calls them: with addresses, for a call with a tensor's address takes a tenth of one with the
// tensor. All are for float32, small sizes and one thread; shapes are as in ops/, sizes were checked by the caller, and
// indices that stand in memory are checked here.
#pragma once

#include <cstdint>

namespace dsv3 {

using Address = std::uintptr_t;

inline float* floats(Address address) { return reinterpret_cast<float*>(address); }
inline std::int32_t* ints(Address address) { return reinterpret_cast<std::int32_t*>(address); }
inline std::int64_t* longs(Address address) { return reinterpret_cast<std::int64_t*>(address); }

void rms_norm(Address x, long x_row, Address w, Address out, long out_row, long rows, long width, double eps);
void add_rms_norm(Address x, Address residual, Address w, Address out, Address total, long rows, long width, double eps);
void rope(Address x, long x_token, long x_head, Address positions, Address table, long table_rows, Address out,
          long tokens, long heads, long width);
void swiglu(Address gate_up, Address weight, Address out, long rows, long width);

void gemm(Address a, long a_row, Address b, long b_row, Address out, long M, long N, long K);
void batched_gemm(Address a, long a_batch, long a_row, Address b, long b_batch, long b_row, Address out, long batch,
                  long M, long N, long K);
void grouped_gemm(Address a, Address b, Address offsets, Address out, long experts, long rows, long N, long K);

void route(Address logits, Address bias, Address idx, Address weights, long tokens, long experts, long k, long groups,
           long topk_groups, bool softmax, bool top2, bool renormalize, double scale);
void permute(Address x, Address idx, Address out, Address row_map, Address offsets, long tokens, long k, long width,
             long experts, long align, long rows);
void unpermute(Address y, Address row_map, Address w, Address out, long tokens, long k, long width, long rows);

// In units of float32: strides as PyTorch counts them.
void copy(Address from, Address to, long n0, long n1, long n2, long from0, long from1, long from2, long to0, long to1,
          long to2);
void add(Address a, Address b, Address out, long count);
void embedding(Address weight, Address tokens, Address out, long count, long width, long vocabulary);

void mla_decode_plan(Address lens, Address out, long batch, long page);
void mla_cache_write(Address cache, Address slots, Address latent, long slots_count, long tokens, long width);
void mla_decode(Address q, Address cache, Address table, Address lens, Address out, Address lse, long batch,
                long queries, long heads, long width, long rank, long page, long num_pages, long table_width,
                long table_row, double scale);

// per_request rows of each request, at positions that count up. False, and nothing is written, where a request has
// filters: those take more than a pass.
bool sample(Address logits, long logits_row, Address temperature, Address top_k, Address top_p, Address min_p,
            Address seed, Address position, Address token, Address logprob, long requests, long per_request,
            long vocabulary);
// What `spec_verify` leaves of the samples at a draft's positions, in place.
void accept(Address draft, Address token, Address logprob, Address accepted, long requests, long drafts);

}  // namespace dsv3
