// Vectors of as many float32 as the compiler was told that the CPU has, and what a kernel does with them.
//
// Sums are taken lane by lane and then across: the order depends on the length of a row only, never on its neighbours.
#pragma once

#include <cstdint>
#include <cstring>

namespace dsv3 {

#if defined(__AVX512F__)
constexpr long LANES = 16;
#elif defined(__AVX__)
constexpr long LANES = 8;
#else
constexpr long LANES = 4;
#endif

using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints = std::int32_t __attribute__((vector_size(4 * LANES)));

inline Floats all(float value) {
    Floats result;
    for (long i = 0; i < LANES; ++i) result[i] = value;
    return result;
}

inline Floats load(const float* from) {
    Floats result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

// The first `count` of a vector; the rest is 0.
inline Floats load(const float* from, long count) {
    Floats result = {};
    std::memcpy(&result, from, count * sizeof(float));
    return result;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

inline void store(float* to, Floats value, long count) { std::memcpy(to, &value, count * sizeof(float)); }

template <long WIDTH>
struct Vector {
    typedef float type __attribute__((vector_size(4 * WIDTH)));
};
using Four = Vector<4>::type;

// The upper half is added to the lower one until four numbers are left.
template <long WIDTH>
inline Four four_of(typename Vector<WIDTH>::type vector) {
    if constexpr (WIDTH == 4) {
        return vector;
    } else {
        typename Vector<WIDTH / 2>::type low, high;
#if __has_builtin(__builtin_shufflevector)
        if constexpr (WIDTH == 16) {
            low = __builtin_shufflevector(vector, vector, 0, 1, 2, 3, 4, 5, 6, 7);
            high = __builtin_shufflevector(vector, vector, 8, 9, 10, 11, 12, 13, 14, 15);
        } else {
            low = __builtin_shufflevector(vector, vector, 0, 1, 2, 3);
            high = __builtin_shufflevector(vector, vector, 4, 5, 6, 7);
        }
#else
        std::memcpy(&low, &vector, sizeof low);
        std::memcpy(&high, reinterpret_cast<const char*>(&vector) + sizeof low, sizeof high);
#endif
        return four_of<WIDTH / 2>(low + high);
    }
}

inline float sum(Floats value) {
    const Four four = four_of<LANES>(value);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// Of four vectors at once, each in the order in which `sum` takes it.
inline Four sums(Floats a_, Floats b_, Floats c_, Floats d_) {
    const Four a = four_of<LANES>(a_), b = four_of<LANES>(b_), c = four_of<LANES>(c_), d = four_of<LANES>(d_);
#if __has_builtin(__builtin_shufflevector)
    // Pairs of a and of b side by side, then those of c and d: a transposition with its additions.
    const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#else
    const auto across = [](Four x) { return (x[0] + x[2]) + (x[1] + x[3]); };
    return Four{across(a), across(b), across(c), across(d)};
#endif
}

// Calls visit(start, count) for every vector of a row of n: with LANES each, then once with what is left.
template <class Visit>
inline void each(long n, Visit visit) {
    long start = 0;
    for (; start + LANES <= n; start += LANES) visit(start, LANES);
    if (start < n) visit(start, n - start);
}

inline Floats load_some(const float* from, long count) { return count == LANES ? load(from) : load(from, count); }

inline void store_some(float* to, Floats value, long count) {
    if (count == LANES)
        store(to, value);
    else
        store(to, value, count);
}

// e^x to about an ulp, 0 below -87: 2^n times a polynomial of what is left of x behind n ln 2 (Cephes' coefficients).
inline Floats exp(Floats x) {
    const Ints tiny = x < -87.0f;
    x = x > 88.0f ? all(88.0f) : x;
    x = tiny ? all(0.0f) : x;
    const float shifter = 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the rounded number
    const Floats shifted = x * 1.44269504f + shifter;
    Ints n, origin;
    const Floats shifters = all(shifter);
    std::memcpy(&n, &shifted, sizeof n);
    std::memcpy(&origin, &shifters, sizeof origin);
    n -= origin;
    const Floats whole = shifted - shifter;
    const Floats r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Ints power = (n + 127) << 23;
    Floats scale;
    std::memcpy(&scale, &power, sizeof scale);
    const Floats result = p * scale;
    return tiny ? all(0.0f) : result;
}

// Of x . w in `count` floats.
inline float dot(const float* x, const float* w, long count) {
    Floats first = {}, second = {};
    long i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        first += load(x + i) * load(w + i);
        second += load(x + i + LANES) * load(w + i + LANES);
    }
    for (; i < count; i += LANES) {
        const long left = count - i < LANES ? count - i : LANES;
        first += load_some(x + i, left) * load_some(w + i, left);
    }
    return sum(first + second);
}

}  // namespace dsv3
