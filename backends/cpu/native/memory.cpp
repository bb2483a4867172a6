// What a step does between its ops: copies, sums and look-ups.
#include <cstring>
#include <stdexcept>

#include "kernels.h"
#include "lanes.h"

namespace dsv3 {

void copy(Address from_, Address to_, long n0, long n1, long n2, long from0, long from1, long from2, long to0, long to1,
          long to2) {
    const float* from = floats(from_);
    float* to = floats(to_);
    for (long i = 0; i < n0; ++i)
        for (long j = 0; j < n1; ++j) {
            const float* source = from + i * from0 + j * from1;
            float* target = to + i * to0 + j * to1;
            if (from2 == 1 && to2 == 1)
                std::memcpy(target, source, n2 * sizeof(float));
            else
                for (long k = 0; k < n2; ++k) target[k * to2] = source[k * from2];
        }
}

void add(Address a_, Address b_, Address out_, long count) {
    const float *a = floats(a_), *b = floats(b_);
    float* out = floats(out_);
    each(count, [&](long i, long n) { store_some(out + i, load_some(a + i, n) + load_some(b + i, n), n); });
}

void embedding(Address weight_, Address tokens_, Address out_, long count, long width, long vocabulary) {
    const float* weight = floats(weight_);
    const auto* tokens = longs(tokens_);
    float* out = floats(out_);
    for (long i = 0; i < count; ++i) {
        if (tokens[i] < 0 || tokens[i] >= vocabulary) throw std::out_of_range("there is no such token");
        std::memcpy(out + i * width, weight + tokens[i] * width, width * sizeof(float));
    }
}

}  // namespace dsv3
