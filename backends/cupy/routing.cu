// Group-limited top-k gating, a warp per token. Macros: EXPERTS, GROUPS, KEPT (groups), CHOICES, SOFTMAX, GROUP_MAX,
// RENORMALIZE, WARPS (a block's warps). Lane l holds the experts l, l + 32, l + 64, ...
#define EACH ((EXPERTS + 31) / 32)
#define SIZE (EXPERTS / GROUPS)
#define NONE __uint_as_float(0xff800000u)  // -inf
#define FULL 0xffffffffu

struct Best { float value; int index; };

// The larger one; of equal ones the lower index.
__device__ Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a; }

__device__ Best best_of_warp(Best mine) {
    for (int mask = 16; mask; mask >>= 1) {
        Best other = {__shfl_xor_sync(FULL, mine.value, mask), __shfl_xor_sync(FULL, mine.index, mask)};
        mine = better(mine, other);
    }
    return mine;
}

__device__ float sum_of_warp(float mine) {
    for (int mask = 16; mask; mask >>= 1) mine = __fadd_rn(mine, __shfl_xor_sync(FULL, mine, mask));
    return mine;
}

// logits f32 [T, EXPERTS], bias f32 [EXPERTS] or null, forced i32 [T, CHOICES] or null
// -> idx i32 [T, CHOICES], weights f32 [T, CHOICES].
extern "C" __global__ void route_kernel(const float* logits, const float* bias, const int* forced, int* idx, float* weights, long long T, float scale) {
    __shared__ float choices[WARPS][EXPERTS + 1];
    __shared__ float affinities[WARPS][EXPERTS + 1];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    long long token = (long long)blockIdx.x * WARPS + warp;
    bool real = token < T;
    long long row = real ? token : T - 1;

    float scores[EACH], largest = NONE, total = 0.f;
    for (int i = 0; i < EACH; i++) {
        int e = lane + 32 * i;
        scores[i] = e < EXPERTS ? logits[row * EXPERTS + e] : NONE;
        largest = fmaxf(largest, scores[i]);
    }
    if (SOFTMAX) {
        for (int mask = 16; mask; mask >>= 1) largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, mask));
        for (int i = 0; i < EACH; i++) total += scores[i] = expf(scores[i] - largest);
        total = sum_of_warp(total);
    }
    for (int i = 0; i < EACH; i++) {
        int e = lane + 32 * i;
        scores[i] = SOFTMAX ? scores[i] / total : 1.f / (1.f + expf(-scores[i]));
        if (e < EXPERTS) {
            affinities[warp][e] = scores[i];
            choices[warp][e] = bias ? __fadd_rn(scores[i], bias[e]) : scores[i];
        }
    }
    __syncwarp();

    int mine = 0;  // lane j: choice j
    if (forced) {
        if (lane < CHOICES) mine = forced[row * CHOICES + lane];
    } else {
        unsigned kept = ~0u;
        if (KEPT < GROUPS) {
            float first = NONE, second = NONE;
            for (int i = 0; lane < GROUPS && i < SIZE; i++) {
                float value = choices[warp][lane * SIZE + i];
                second = fmaxf(second, fminf(first, value));
                first = fmaxf(first, value);
            }
            Best group = {lane < GROUPS ? (GROUP_MAX || SIZE == 1 ? first : __fadd_rn(first, second)) : NONE, lane};
            kept = 0;
            for (int i = 0; i < KEPT; i++) {
                Best best = best_of_warp(kept >> lane & 1 ? Best{NONE, lane + 32} : group);
                kept |= 1u << best.index;
            }
        }
        float left[EACH];
        for (int i = 0; i < EACH; i++) {
            int e = lane + 32 * i;
            left[i] = e < EXPERTS && (kept >> (e / SIZE) & 1) ? choices[warp][e] : NONE;
        }
        for (int j = 0; j < CHOICES; j++) {
            Best best = {NONE, EXPERTS};
            for (int i = 0; i < EACH; i++) best = better(best, Best{left[i], lane + 32 * i});
            best = best_of_warp(best);
            if (lane == j) mine = best.index;
            if (best.index % 32 == lane) left[best.index / 32] = NONE;
        }
    }

    float weight = lane < CHOICES ? affinities[warp][mine] : 0.f;
    if (RENORMALIZE) {
        float sum = 0.f;
        for (int j = 0; j < CHOICES; j++) sum = __fadd_rn(sum, __shfl_sync(FULL, weight, j));
        weight /= sum + 1e-20f;
    }
    if (real && lane < CHOICES) {
        idx[token * CHOICES + lane] = mine;
        weights[token * CHOICES + lane] = weight * scale;
    }
}
