// Sampling without filters: the likeliest token, or a race of exponential noise (backends/cpu/sampling.py, _race).
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "lanes.h"

namespace dsv3 {

namespace {

constexpr std::uint32_t FACTORS[] = {0x2C1B3C6D, 0x297A2D39};  // ops/sampling.py
constexpr float LARGEST_UNIFORM = 1.0f - 1.0f / (1 << 24);
constexpr float ROOM = 1.0f + 1.0f / (1 << 20);  // with it, rounding never puts a bound below what it bounds
constexpr long BLOCK = 1024;                     // numbers summed in float32 before double takes over

// On single words and on vectors of them.
template <class Word>
inline Word mix(Word word) {
    word ^= word >> 15;
    word *= FACTORS[0];
    word ^= word >> 12;
    word *= FACTORS[1];
    return word ^ (word >> 15);
}

using Words = std::uint32_t __attribute__((vector_size(4 * LANES)));

// Of equal ones the first.
long likeliest(const float* logits, long count) {
    Floats most = all(logits[0]);
    each(count, [&](long i, long n) {
        Floats some = load_some(logits + i, n);
        for (long j = n; j < LANES; ++j) some[j] = logits[0];
        most = some > most ? some : most;
    });
    float largest = most[0];
    for (long j = 1; j < LANES; ++j) largest = most[j] > largest ? most[j] : largest;
    const float* found = std::find(logits, logits + count, largest);
    return found == logits + count ? 0 : found - logits;  // of NaNs none is found
}

// log(1 + sum of e^(logit - largest) over all but the likeliest): the log-sum-exp behind the largest.
double behind(const float* logits, long count, long best) {
    const float largest = logits[best];
    double total = 0.0;
    for (long start = 0; start < count; start += BLOCK) {
        Floats part = {};
        const long size = std::min(BLOCK, count - start);
        each(size, [&](long i, long n) {
            Floats weight = exp(load_some(logits + start + i, n) - largest);
            for (long j = n; j < LANES; ++j) weight[j] = 0.0f;
            const long place = best - start - i;
            if (place >= 0 && place < n) weight[place] = 0.0f;
            part += weight;
        });
        total += sum(part);
    }
    return std::log1p(total);
}

// The first of the largest weight / -log(1 - u). As -log(1 - u) >= u, weight / u is a bound, and logarithms are taken
// of those only whose bound is above the best so far.
long drawn(const float* logits, long count, float largest, float temperature, std::int64_t seed, std::int64_t position) {
    const auto low = static_cast<std::uint32_t>(seed), high = static_cast<std::uint32_t>(seed >> 32);
    const auto place = static_cast<std::uint32_t>(position);
    const std::uint32_t first = mix(mix(mix(low + 0x9E3779B9u) ^ high) ^ place);
    const std::uint32_t second = mix((mix(mix(high + 0x7F4A7C15u) ^ low)) + place);
    Words token;
    for (long j = 0; j < LANES; ++j) token[j] = static_cast<std::uint32_t>(j);
    double best = -1.0;
    long winner = 0;
    each(count, [&](long i, long n) {
        const Words bits = mix(mix(token ^ first) + second) >> 1;
        const Floats uniform = (__builtin_convertvector(bits, Floats) + 0.5f) * (1.0f / 2147483648.0f);
        const Floats scaled = (load_some(logits + i, n) - largest) / temperature;
        const Floats weight = exp(scaled), bound = weight / uniform * ROOM;
        const Ints above = bound > static_cast<float>(best);
        int some = 0;
        for (long j = 0; j < LANES; ++j) some |= above[j];
        if (some)
            for (long j = 0; j < n; ++j) {
                if (!(static_cast<double>(bound[j]) > best)) continue;
                const double score = weight[j] / -std::log1p(-static_cast<double>(std::min(uniform[j], LARGEST_UNIFORM)));
                if (score > best) {
                    best = score;
                    winner = i + j;
                }
            }
        token += static_cast<std::uint32_t>(LANES);
    });
    return winner;
}

}  // namespace

bool sample(Address logits_, long logits_row, Address temperature_, Address top_k_, Address top_p_, Address min_p_,
            Address seed_, Address position_, Address token_, Address logprob_, long requests, long per_request,
            long vocabulary) {
    const float *temperature = floats(temperature_), *top_p = floats(top_p_), *min_p = floats(min_p_);
    const auto *top_k = ints(top_k_);
    const auto *seed = longs(seed_), *position = longs(position_);
    for (long i = 0; i < requests; ++i)
        if (temperature[i] > 0 && (top_k[i] > 0 || top_p[i] < 1 || min_p[i] > 0)) return false;
    for (long row = 0; row < requests * per_request; ++row) {
        const float* logits = floats(logits_) + row * logits_row;
        const long i = row / per_request, best = likeliest(logits, vocabulary);
        const float largest = logits[best];
        long token = best;
        if (temperature[i] > 0)
            token = drawn(logits, vocabulary, largest, temperature[i], seed[i], position[i] + row % per_request);
        longs(token_)[row] = token;
        floats(logprob_)[row] =
            static_cast<float>(static_cast<double>(logits[token] - largest) - behind(logits, vocabulary, best));
    }
    return true;
}

void accept(Address draft_, Address token_, Address logprob_, Address accepted_, long requests, long drafts) {
    const auto* draft = longs(draft_);
    auto* token = longs(token_);
    float* logprob = floats(logprob_);
    for (long i = 0; i < requests; ++i, draft += drafts, token += drafts + 1, logprob += drafts + 1) {
        long right = 0;
        while (right < drafts && draft[right] == token[right]) ++right;
        ints(accepted_)[i] = static_cast<std::int32_t>(right);
        for (long j = right + 1; j <= drafts; ++j) {
            token[j] = -1;
            logprob[j] = 0.0f;
        }
    }
}

}  // namespace dsv3
