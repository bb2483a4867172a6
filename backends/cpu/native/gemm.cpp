// Products of a few rows with weights [N, K].
#include <stdexcept>

#include "kernels.h"
#include "tile.h"

namespace dsv3 {

namespace {

// All rows meet a few columns before the next ones are read: a weight comes from memory once.
template <long WIDTH>
void columns(const float* a, long a_row, const float* b, long b_row, float* out, long out_row, long M, long K) {
    long m = 0;
    for (; m + 4 <= M; m += 4) tile<4, WIDTH>(a + m * a_row, a_row, b, b_row, out + m * out_row, out_row, K);
    for (; m + 2 <= M; m += 2) tile<2, WIDTH>(a + m * a_row, a_row, b, b_row, out + m * out_row, out_row, K);
    if (m < M) tile<1, WIDTH>(a + m * a_row, a_row, b, b_row, out + m * out_row, out_row, K);
}

void product(const float* a, long a_row, const float* b, long b_row, float* out, long out_row, long M, long N, long K) {
    long n = 0;
    for (; n + COLUMNS <= N; n += COLUMNS) columns<COLUMNS>(a, a_row, b + n * b_row, b_row, out + n, out_row, M, K);
    for (; n < N; ++n) columns<1>(a, a_row, b + n * b_row, b_row, out + n, out_row, M, K);
}

}  // namespace

void gemm(Address a, long a_row, Address b, long b_row, Address out, long M, long N, long K) {
    product(floats(a), a_row, floats(b), b_row, floats(out), N, M, N, K);
}

void batched_gemm(Address a_, long a_batch, long a_row, Address b_, long b_batch, long b_row, Address out_, long batch,
                  long M, long N, long K) {
    const float *a = floats(a_), *b = floats(b_);
    float* out = floats(out_);
    for (long i = 0; i < batch; ++i)
        product(a + i * a_batch, a_row, b + i * b_batch, b_row, out + i * M * N, N, M, N, K);
}

void grouped_gemm(Address a_, Address b_, Address offsets_, Address out_, long experts, long rows, long N, long K) {
    const float *a = floats(a_), *b = floats(b_);
    const auto* offsets = ints(offsets_);
    float* out = floats(out_);
    for (long expert = 0; expert < experts; ++expert) {
        const long start = offsets[expert], end = offsets[expert + 1];
        if (start < 0 || end < start || end > rows) throw std::out_of_range("an expert's rows lie outside of the buffer");
        if (start < end) product(a + start * K, K, b + expert * N * K, K, out + start * N, N, end - start, N, K);
    }
    for (long i = offsets[experts] * N; i < rows * N; ++i) out[i] = 0.0f;
}

}  // namespace dsv3
