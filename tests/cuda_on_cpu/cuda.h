// CUDA C++ on a CPU, for tests: a block's threads are fibers of one thread of the host, run in turn from one point of
// synchronisation to the next. Blocks run one after the other. What it cannot show: races within a warp that a GPU would
// have between such points, and anything about speed.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <algorithm>
#include <vector>

#define __global__
#define __device__ static inline
#define __shared__ static

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct uint4 { unsigned x, y, z, w; };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    dim3 index;
    int lane = 0, warp = 0;
    enum { RUNS, AT_BLOCK, AT_WARP, DONE } state = RUNS;
    uint64_t posted = 0;
};
static std::vector<Fiber> fibers;
static Fiber* self = nullptr;
static ucontext_t scheduler;
static dim3 blockIdx, blockDim, gridDim;
#define threadIdx (self->index)

static void wait_at(decltype(Fiber::state) where) {
    self->state = where;
    Fiber* me = self;
    swapcontext(&me->context, &scheduler);
}
static inline void __syncthreads() { wait_at(Fiber::AT_BLOCK); }
static inline void __syncwarp(unsigned = ~0u) { wait_at(Fiber::AT_WARP); }

template <class T> static T exchange(T value, int from) {
    self->posted = 0;
    memcpy(&self->posted, &value, sizeof value);
    __syncwarp();
    size_t at = self->warp * 32 + from;
    T other = value;
    if (from >= 0 && from < 32 && at < fibers.size()) memcpy(&other, &fibers[at].posted, sizeof other);
    __syncwarp();
    return other;
}
template <class T> static T __shfl_sync(unsigned, T value, int from) { return exchange(value, from & 31); }
template <class T> static T __shfl_xor_sync(unsigned, T value, int mask) { return exchange(value, self->lane ^ mask); }
template <class T> static unsigned __match_any_sync(unsigned, T value) {
    unsigned peers = 0;
    for (int lane = 0; lane < 32; lane++) peers |= (exchange(value, lane) == value ? 1u : 0u) << lane;
    return peers;
}
static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <class T> static T atomicAdd(T* at, T value) { T old = *at; *at += value; return old; }
static inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
static inline float __fadd_rn(float a, float b) { return a + b; }
using std::max;
using std::min;

// The call of the kernel under test, made by every fiber; `run_block` runs a block to its end.
static void (*body)() = nullptr;
static void enter() { body(); self->state = Fiber::DONE; }

static void release() {
    size_t count = fibers.size(), done = 0, waiting = 0;
    for (auto& fiber : fibers) { done += fiber.state == Fiber::DONE; waiting += fiber.state == Fiber::AT_BLOCK; }
    if (waiting && done + waiting == count)
        for (auto& fiber : fibers) if (fiber.state == Fiber::AT_BLOCK) fiber.state = Fiber::RUNS;
    for (size_t first = 0; first < count; first += 32) {
        size_t last = std::min(first + 32, count);
        bool all = true;
        for (size_t i = first; i < last; i++) all &= fibers[i].state == Fiber::AT_WARP || fibers[i].state == Fiber::DONE;
        for (size_t i = first; all && i < last; i++) if (fibers[i].state == Fiber::AT_WARP) fibers[i].state = Fiber::RUNS;
    }
}

// Returns false where threads wait for each other for ever.
static bool run_block() {
    size_t count = blockDim.x * blockDim.y * blockDim.z;
    fibers.assign(count, Fiber());
    for (size_t i = 0; i < count; i++) {
        Fiber& fiber = fibers[i];
        fiber.index = {unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y), unsigned(i / blockDim.x / blockDim.y)};
        fiber.lane = i % 32, fiber.warp = i / 32;
        fiber.stack.resize(64 << 10);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    for (;;) {
        bool ran = false, done = true;
        for (auto& fiber : fibers) {
            if (fiber.state == Fiber::RUNS) { self = &fiber; swapcontext(&scheduler, &fiber.context); ran = true; }
            done &= fiber.state == Fiber::DONE;
        }
        if (done) return true;
        if (!ran) return false;
        release();
    }
}
