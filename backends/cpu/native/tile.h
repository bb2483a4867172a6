// A few rows times a few columns, kept in registers.
#pragma once

#include "lanes.h"

namespace dsv3 {

constexpr long COLUMNS = 4;  // outputs of a row at a time: that many chains of multiply-adds hide their latency

// out [ROWS, WIDTH] = a [ROWS, K] b^T, b [WIDTH, K].
template <long ROWS, long WIDTH>
inline void tile(const float* a, long a_row, const float* b, long b_row, float* out, long out_row, long K) {
    Floats parts[ROWS][WIDTH] = {};
    each(K, [&](long k, long n) {
        Floats left[ROWS];
        for (long i = 0; i < ROWS; ++i) left[i] = load_some(a + i * a_row + k, n);
        for (long j = 0; j < WIDTH; ++j) {
            const Floats right = load_some(b + j * b_row + k, n);
            for (long i = 0; i < ROWS; ++i) parts[i][j] += left[i] * right;
        }
    });
    for (long i = 0; i < ROWS; ++i) {
        float* to = out + i * out_row;
        if constexpr (WIDTH == 4) {
            const Four four = sums(parts[i][0], parts[i][1], parts[i][2], parts[i][3]);
            std::memcpy(to, &four, sizeof four);
        } else {
            for (long j = 0; j < WIDTH; ++j) to[j] = sum(parts[i][j]);
        }
    }
}

}  // namespace dsv3
