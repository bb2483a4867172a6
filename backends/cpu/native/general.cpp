// Norms, rotary positions and SwiGLU of a few rows.
#include <cmath>
#include <stdexcept>

#include "kernels.h"
#include "lanes.h"

namespace dsv3 {

namespace {

// out = x / sqrt(mean(x^2) + eps) * w, of one row of `width`.
void normalized(const float* x, const float* w, float* out, long width, double eps) {
    const float rstd = 1.0f / std::sqrt(dot(x, x, width) / static_cast<float>(width) + static_cast<float>(eps));
    each(width, [&](long i, long n) { store_some(out + i, load_some(x + i, n) * rstd * load_some(w + i, n), n); });
}

}  // namespace

void rms_norm(Address x_, long x_row, Address w_, Address out_, long out_row, long rows, long width, double eps) {
    const float *x = floats(x_), *w = floats(w_);
    float* out = floats(out_);
    for (long row = 0; row < rows; ++row) normalized(x + row * x_row, w, out + row * out_row, width, eps);
}

void add_rms_norm(Address x_, Address residual_, Address w_, Address out_, Address total_, long rows, long width,
                  double eps) {
    const float *x = floats(x_), *residual = floats(residual_), *w = floats(w_);
    float *out = floats(out_), *total = floats(total_);
    each(rows * width, [&](long i, long n) {
        store_some(total + i, load_some(x + i, n) + load_some(residual + i, n), n);
    });
    for (long row = 0; row < rows; ++row) normalized(total + row * width, w, out + row * width, width, eps);
}

void rope(Address x_, long x_token, long x_head, Address positions_, Address table_, long table_rows, Address out_,
          long tokens, long heads, long width) {
    const float *x = floats(x_), *table = floats(table_);
    const auto* positions = longs(positions_);
    float* out = floats(out_);
    for (long token = 0; token < tokens; ++token) {
        if (positions[token] < 0 || positions[token] >= table_rows)
            throw std::out_of_range("a position lies outside of the table");
        const float *cos = table + positions[token] * width, *sin = cos + width / 2;
        for (long head = 0; head < heads; ++head) {
            const float* pair = x + token * x_token + head * x_head;
            for (long i = 0; i < width / 2; ++i, pair += 2, out += 2) {
                out[0] = pair[0] * cos[i] - pair[1] * sin[i];
                out[1] = pair[0] * sin[i] + pair[1] * cos[i];
            }
        }
    }
}

void swiglu(Address gate_up_, Address weight_, Address out_, long rows, long width) {
    const float *gate_up = floats(gate_up_), *weight = floats(weight_);
    float* out = floats(out_);
    for (long row = 0; row < rows; ++row) {
        const float *gate = gate_up + row * 2 * width, *up = gate + width;
        float* to = out + row * width;
        each(width, [&](long i, long n) {
            const Floats g = load_some(gate + i, n);
            Floats hidden = g / (1.0f + exp(-g)) * load_some(up + i, n);
            if (weight) hidden *= weight[row];
            store_some(to + i, hidden, n);
        });
    }
}

}  // namespace dsv3
