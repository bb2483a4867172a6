// The latent cache in float32, and attention over it in the absorbed form.
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "tile.h"

namespace dsv3 {

namespace {

constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// A sequence's latents: rows of `width`, `page` of them at a place.
struct Latents {
    const float* cache;
    const std::int32_t* table;
    long page, width;

    // visit(row of a page's first token, that token, tokens), page by page.
    template <class Visit>
    void each_page(long tokens, Visit visit) const {
        for (long start = 0; start < tokens; start += page)
            visit(cache + table[start / page] * page * width, start, tokens - start < page ? tokens - start : page);
    }
};

// scores[i][t] = q[i] . latent t, for all tokens.
template <long ROWS>
void score(const Latents& latents, const float* q, long tokens, float* scores, long stride) {
    const long width = latents.width;
    latents.each_page(tokens, [&](const float* row, long start, long count) {
        long t = 0;
        for (; t + COLUMNS <= count; t += COLUMNS)
            tile<ROWS, COLUMNS>(q, width, row + t * width, width, scores + start + t, stride, width);
        for (; t < count; ++t) tile<ROWS, 1>(q, width, row + t * width, width, scores + start + t, stride, width);
    });
}

// Scores of the first `seen` tokens -> e^(score * scale - their largest), of the others -> 0. Sets what the weights must
// be multiplied by to sum up to 1, and returns the log-sum-exp.
float weigh(float* scores, long seen, long tokens, float scale, float* factor) {
    *factor = 0.0f;
    if (seen < tokens) std::memset(scores + (seen > 0 ? seen : 0), 0, (tokens - (seen > 0 ? seen : 0)) * sizeof(float));
    if (seen <= 0) return NOTHING;
    Floats most = all(NOTHING), total = {};
    each(seen, [&](long t, long n) {
        Floats some = load_some(scores + t, n) * scale;
        store_some(scores + t, some, n);
        for (long i = n; i < LANES; ++i) some[i] = NOTHING;
        most = some > most ? some : most;
    });
    float largest = most[0];
    for (long i = 1; i < LANES; ++i) largest = most[i] > largest ? most[i] : largest;
    each(seen, [&](long t, long n) {
        store_some(scores + t, exp(load_some(scores + t, n) - largest), n);
        total += load_some(scores + t, n);
    });
    *factor = 1.0f / sum(total);
    return largest + std::log(sum(total));
}

// COUNT vectors of columns of each result, the last one of `last` numbers: the sum of latents times their weights.
template <long ROWS, long COUNT>
void mix(const Latents& latents, long column, long last, long tokens, const float* weights, long stride,
         const float* factors, float* out, long rank) {
    Floats sums[ROWS][COUNT] = {};
    latents.each_page(tokens, [&](const float* row, long start, long count) {
        row += column;
        for (long t = start; t < start + count; ++t, row += latents.width)
            for (long j = 0; j < COUNT; ++j) {
                const Floats latent = j < COUNT - 1 ? load(row + j * LANES) : load_some(row + j * LANES, last);
                for (long i = 0; i < ROWS; ++i) sums[i][j] += latent * weights[i * stride + t];
            }
    });
    for (long i = 0; i < ROWS; ++i)
        for (long j = 0; j < COUNT; ++j)
            store_some(out + i * rank + column + j * LANES, sums[i][j] * factors[i], j < COUNT - 1 ? LANES : last);
}

template <long ROWS>
void mix_all(const Latents& latents, long tokens, const float* weights, long stride, const float* factors, float* out,
             long rank) {
    constexpr long MOST = 4;  // vectors of a result that stay in registers while all tokens go by
    for (long column = 0; column < rank;) {
        const long left = rank - column, vectors = (left + LANES - 1) / LANES;
        const long count = vectors < MOST ? vectors : MOST;
        const long last = left < count * LANES ? left - (count - 1) * LANES : LANES;
        const auto run = count == 1   ? mix<ROWS, 1>
                         : count == 2 ? mix<ROWS, 2>
                         : count == 3 ? mix<ROWS, 3>
                                      : mix<ROWS, MOST>;
        run(latents, column, last, tokens, weights, stride, factors, out, rank);
        column += count * LANES;
    }
}

// ROWS queries of a sequence, of which the i-th sees the first seen[i] tokens, and the last one sees most.
template <long ROWS>
void attend(const Latents& latents, const float* q, const long* seen, float scale, long rank,
            std::vector<float>& scores, float* out, float* lse) {
    const long tokens = seen[ROWS - 1] > 0 ? seen[ROWS - 1] : 0;
    scores.resize(ROWS * tokens);
    float factors[ROWS];
    score<ROWS>(latents, q, tokens, scores.data(), tokens);
    for (long i = 0; i < ROWS; ++i) lse[i] = weigh(scores.data() + i * tokens, seen[i], tokens, scale, factors + i);
    mix_all<ROWS>(latents, tokens, scores.data(), tokens, factors, out, rank);
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
                long table_row, double scale_) {
    const float *q = floats(q_), *cache = floats(cache_), scale = static_cast<float>(scale_);
    const auto *table = ints(table_), *lens = ints(lens_);
    float *out = floats(out_), *lse = floats(lse_);
    std::vector<float> scores;
    for (long b = 0; b < batch; ++b, table += table_row) {
        const long used = (lens[b] + page - 1) / page;
        if (lens[b] < 0 || used > table_width) throw std::out_of_range("a sequence is longer than its table");
        for (long i = 0; i < used; ++i)
            if (table[i] < 0 || table[i] >= num_pages) throw std::out_of_range("there is no such page");
        const Latents latents{cache, table, page, width};
        const long rows = queries * heads;
        for (long row = 0; row < rows;) {
            long seen[4];
            for (long i = 0; i < 4; ++i) seen[i] = lens[b] - queries + (row + i) / heads + 1;
            const long block = rows - row >= 4 ? 4 : rows - row >= 2 ? 2 : 1;
            const auto run = block == 4 ? attend<4> : block == 2 ? attend<2> : attend<1>;
            run(latents, q, seen, scale, rank, scores, out, lse);
            row += block, q += block * width, out += block * rank, lse += block;
        }
    }
}

}  // namespace dsv3
