// Routing, and moving rows to experts and back.
#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "lanes.h"

namespace dsv3 {

namespace {

constexpr float LOWEST = -std::numeric_limits<float>::infinity();
constexpr float EPSILON = 1e-20f;  // ops/moe.py

void affinities(const float* logits, float* scores, long experts, bool softmax) {
    float largest = LOWEST;
    if (softmax)
        for (long e = 0; e < experts; ++e) largest = logits[e] > largest ? logits[e] : largest;
    Floats total = {};
    each(experts, [&](long e, long n) {
        const Floats x = load_some(logits + e, n);
        Floats score = softmax ? exp(x - largest) : 1.0f / (1.0f + exp(-x));
        store_some(scores + e, score, n);
        total += load_some(scores + e, n);
    });
    if (!softmax) return;
    const float sum_ = sum(total);
    for (long e = 0; e < experts; ++e) scores[e] /= sum_;
}

// Of `count` values the index of the largest that is not taken (one is not); of equal ones the first.
long largest(const float* values, const char* taken, long count) {
    long best = 0;
    while (best + 1 < count && taken[best]) ++best;
    for (long i = best + 1; i < count; ++i)
        if (!taken[i] && values[i] > values[best]) best = i;
    return best;
}

float group_score(const float* values, long count, bool top2) {
    float first = values[0], second = LOWEST;
    for (long i = 1; i < count; ++i) {
        if (values[i] > first) {
            second = first;
            first = values[i];
        } else if (values[i] > second) {
            second = values[i];
        }
    }
    return top2 && count > 1 ? first + second : first;
}

}  // namespace

void route(Address logits_, Address bias_, Address idx_, Address weights_, long tokens, long experts, long k, long groups,
           long topk_groups, bool softmax, bool top2, bool renormalize, double scale) {
    const float *logits = floats(logits_), *bias = floats(bias_);
    auto* idx = ints(idx_);
    float* weights = floats(weights_);
    const long size = experts / groups;
    std::vector<float> scores(experts), choice(experts), of_groups(groups);
    std::vector<char> taken(experts), kept(groups);
    for (long token = 0; token < tokens; ++token, logits += experts, idx += k, weights += k) {
        affinities(logits, scores.data(), experts, softmax);
        for (long e = 0; e < experts; ++e) choice[e] = bias ? scores[e] + bias[e] : scores[e];
        std::fill(taken.begin(), taken.end(), 0);
        if (topk_groups < groups) {
            std::fill(kept.begin(), kept.end(), 0);
            for (long g = 0; g < groups; ++g) of_groups[g] = group_score(choice.data() + g * size, size, top2);
            for (long i = 0; i < topk_groups; ++i) kept[largest(of_groups.data(), kept.data(), groups)] = 1;
            for (long e = 0; e < experts; ++e) taken[e] = !kept[e / size];
        }
        float total = 0.0f;
        for (long j = 0; j < k; ++j) {
            const long best = largest(choice.data(), taken.data(), experts);
            taken[best] = 1;
            idx[j] = static_cast<std::int32_t>(best);
            weights[j] = scores[best];
            total += scores[best];
        }
        for (long j = 0; j < k; ++j) {
            if (renormalize) weights[j] /= total + EPSILON;
            weights[j] *= static_cast<float>(scale);
        }
    }
}

void permute(Address x_, Address idx_, Address out_, Address row_map_, Address offsets_, long tokens, long k, long width,
             long experts, long align, long rows) {
    const float* x = floats(x_);
    const auto* idx = ints(idx_);
    float* out = floats(out_);
    auto *row_map = ints(row_map_), *offsets = ints(offsets_);
    std::vector<std::int32_t> next(experts, 0);
    for (long pair = 0; pair < tokens * k; ++pair) {
        if (idx[pair] < 0 || idx[pair] >= experts) throw std::out_of_range("there is no such expert");
        ++next[idx[pair]];
    }
    std::int32_t end = 0;
    for (long e = 0; e < experts; ++e) {
        offsets[e] = end;
        end += (next[e] + align - 1) / align * align;
        next[e] = offsets[e];
    }
    offsets[experts] = end;
    if (align > 1) std::memset(out, 0, rows * width * sizeof(float));
    for (long pair = 0; pair < tokens * k; ++pair) {
        const std::int32_t row = next[idx[pair]]++;
        row_map[pair] = row;
        std::memcpy(out + row * width, x + pair / k * width, width * sizeof(float));
    }
}

void unpermute(Address y_, Address row_map_, Address w_, Address out_, long tokens, long k, long width, long rows) {
    const float *y = floats(y_), *w = floats(w_);
    const auto* row_map = ints(row_map_);
    float* out = floats(out_);
    for (long pair = 0; pair < tokens * k; ++pair) {
        const long row = row_map[pair];
        if (row < 0 || row >= rows) throw std::out_of_range("a token's row lies outside of the buffer");
        const float weight = w ? w[pair] : 1.0f;
        const float* from = y + row * width;
        float* to = out + pair / k * width;
        const bool first = pair % k == 0;
        each(width, [&](long i, long n) {
            const Floats term = load_some(from + i, n) * weight;
            store_some(to + i, first ? term : load_some(to + i, n) + term, n);
        });
    }
}

}  // namespace dsv3
