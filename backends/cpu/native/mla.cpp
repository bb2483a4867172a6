// The latent cache in float32, and attention over it in the absorbed form.
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "lanes.h"

namespace dsv3 {

namespace {

constexpr long VALUES = 4;  // vectors of a result that stay in registers while all tokens go by

// The rows of a sequence, page by page: visit(row of its first token, first token, tokens).
template <class Visit>
void pages(const float* cache, const std::int32_t* table, long page, long width, long tokens, Visit visit) {
    for (long start = 0; start < tokens; start += page)
        visit(cache + table[start / page] * page * width, start, tokens - start < page ? tokens - start : page);
}

// scores[t] = q . row t * scale, of which the largest is returned.
float scored(const float* q, const float* row, long width, long tokens, float scale, float* scores, float largest) {
    for (long t = 0; t < tokens; ++t, row += width) {
        scores[t] = dot(q, row, width) * scale;
        largest = scores[t] > largest ? scores[t] : largest;
    }
    return largest;
}

// scores -> e^(scores - largest), of which the sum is returned.
float weighed(float* scores, long tokens, float largest) {
    Floats total = {};
    each(tokens, [&](long t, long n) {
        store_some(scores + t, exp(load_some(scores + t, n) - largest), n);
        total += load_some(scores + t, n);
    });
    return sum(total);
}

// Columns of the sum of rows, each times its weight: COUNT vectors of them, the last one of `last` numbers.
template <long COUNT>
void mixed(const float* cache, const std::int32_t* table, long page, long width, long tokens, const float* weights,
           float factor, float* out, long last) {
    Floats sums[COUNT] = {};
    pages(cache, table, page, width, tokens, [&](const float* row, long start, long count) {
        for (long t = 0; t < count; ++t, row += width) {
            const float weight = weights[start + t];
            for (long i = 0; i < COUNT - 1; ++i) sums[i] += load(row + i * LANES) * weight;
            sums[COUNT - 1] += load_some(row + (COUNT - 1) * LANES, last) * weight;
        }
    });
    for (long i = 0; i < COUNT; ++i) store_some(out + i * LANES, sums[i] * factor, i < COUNT - 1 ? LANES : last);
}

void attended(const float* cache, const std::int32_t* table, long page, long width, long tokens, const float* weights,
              float factor, float* out, long rank) {
    long column = 0;
    for (; column + VALUES * LANES <= rank; column += VALUES * LANES)
        mixed<VALUES>(cache + column, table, page, width, tokens, weights, factor, out + column, LANES);
    for (; column < rank; column += LANES)
        mixed<1>(cache + column, table, page, width, tokens, weights, factor, out + column,
                 rank - column < LANES ? rank - column : LANES);
}

}  // namespace

void mla_decode_plan(Address lens_, Address out_, long batch, long page) {
    const auto* lens = ints(lens_);
    auto* out = ints(out_);
    for (long b = 0; b < batch; ++b) out[b] = static_cast<std::int32_t>((lens[b] + page - 1) / page);
}

void mla_cache_write(Address cache_, Address slots_, Address latent_, long slots_count, long tokens, long width) {
    float* cache = floats(cache_);
    const auto* slots = longs(slots_);
    const float* latent = floats(latent_);
    for (long t = 0; t < tokens; ++t)
        if (slots[t] < 0 || slots[t] >= slots_count) throw std::out_of_range("a slot lies outside of the cache");
    for (long t = 0; t < tokens; ++t)
        std::memcpy(cache + slots[t] * width, latent + t * width, width * sizeof(float));
}

void mla_decode(Address q_, Address cache_, Address table_, Address lens_, Address out_, Address lse_, long batch,
                long queries, long heads, long width, long rank, long page, long num_pages, long table_width,
                long table_row, double scale) {
    const float *q = floats(q_), *cache = floats(cache_);
    const auto *table = ints(table_), *lens = ints(lens_);
    float *out = floats(out_), *lse = floats(lse_);
    std::vector<float> scores;
    for (long b = 0; b < batch; ++b, table += table_row) {
        const long used = (lens[b] + page - 1) / page;
        if (lens[b] < 0 || used > table_width) throw std::out_of_range("a sequence is longer than its table");
        for (long i = 0; i < used; ++i)
            if (table[i] < 0 || table[i] >= num_pages) throw std::out_of_range("there is no such page");
        scores.resize(lens[b]);
        for (long s = 0; s < queries; ++s) {
            const long seen = lens[b] - queries + s + 1;
            for (long h = 0; h < heads; ++h, q += width, out += rank, ++lse) {
                if (seen <= 0) {
                    std::memset(out, 0, rank * sizeof(float));
                    *lse = -std::numeric_limits<float>::infinity();
                    continue;
                }
                float largest = -std::numeric_limits<float>::infinity();
                pages(cache, table, page, width, seen, [&](const float* row, long start, long count) {
                    largest = scored(q, row, width, count, static_cast<float>(scale), scores.data() + start, largest);
                });
                const float total = weighed(scores.data(), seen, largest);
                *lse = largest + std::log(total);
                attended(cache, table, page, width, seen, scores.data(), 1.0f / total, out, rank);
            }
        }
    }
}

}  // namespace dsv3
