// Sampling with filters, a block per request: the cut of top-k, top-p and min-p is found by a radix search over the bits of
// the logits, 8 at a time, and never by a sort. Sums of probabilities are whole numbers, so that their order, which atomics
// leave open, does not matter. Macro: THREADS.
#define FULL 0xffffffffu
#define WARPS (THREADS / 32)
#define LOWEST __uint_as_float(0xff800000u)  // -inf
#define UNIT 68719476736.f                   // 2**36: what a probability of 1 counts

typedef unsigned int u32;
typedef unsigned long long u64;

__device__ u32 mixed(u32 word) {
    word ^= word >> 15;
    word *= 0x2C1B3C6Du;
    word ^= word >> 12;
    word *= 0x297A2D39u;
    return word ^ word >> 15;
}

// Standard Gumbel noise of one token, by the rule of ops/sampling.py.
__device__ float gumbel(u32 first, u32 second, u32 token) {
    u32 bits = mixed(mixed(token ^ first) + second) >> 1;
    float uniform = fminf(((float)bits + 0.5f) * 4.656612873077393e-10f, 0.99999994f);
    return -logf(-log1pf(-uniform));
}

// Floats as numbers in the same order.
__device__ u32 key_of(float x) {
    u32 bits = __float_as_uint(x + 0.f);  // -0 is 0
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ float of_key(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

struct Best { float value; int index; };

__device__ Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a; }

// The block's largest, of equal ones the lowest index; every thread gets it.
__device__ Best best_of_block(Best mine) {
    __shared__ float values[WARPS];
    __shared__ int indices[WARPS];
    for (int mask = 16; mask; mask >>= 1) {
        Best other = {__shfl_xor_sync(FULL, mine.value, mask), __shfl_xor_sync(FULL, mine.index, mask)};
        mine = better(mine, other);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = mine.value, indices[threadIdx.x / 32] = mine.index;
    __syncthreads();
    mine = {values[0], indices[0]};
    for (int w = 1; w < WARPS; w++) mine = better(mine, Best{values[w], indices[w]});
    return mine;
}

__device__ float sum_of_block(float mine) {
    __shared__ float sums[WARPS];
    for (int mask = 16; mask; mask >>= 1) mine += __shfl_xor_sync(FULL, mine, mask);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = mine;
    __syncthreads();
    float sum = 0.f;
    for (int w = 0; w < WARPS; w++) sum += sums[w];
    return sum;
}

// What is kept: keys above `key`, and the first `ties` tokens with that key. mass: of all that, in UNITs.
struct Cut { u32 key; long long ties; u64 mass; };

struct Row { const float* logits; long long V; float largest, divisor; };

__device__ float scaled(const Row& row, long long token) { return (row.logits[token] - row.largest) / row.divisor; }

__device__ u64 mass_of(float x) { return (u64)(expf(x) * UNIT + 0.5f); }

// The longest beginning of the tokens, likeliest first, that has at most `most` tokens, or whose mass reaches `enough`;
// none below `floor`. What is beyond `within` does not count.
__device__ Cut search(const Row& row, Cut within, long long most, u64 enough) {
    __shared__ u64 masses[256];
    __shared__ u32 counts[256];
    __shared__ u32 prefix;
    __shared__ long long count_before;
    __shared__ u64 mass_before;
    if (threadIdx.x == 0) prefix = 0, count_before = 0, mass_before = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int bin = threadIdx.x; bin < 256; bin += THREADS) masses[bin] = 0, counts[bin] = 0;
        __syncthreads();
        for (long long token = threadIdx.x; token < row.V; token += THREADS) {
            float x = scaled(row, token);
            u32 key = key_of(x);
            if (key < within.key || (shift < 24 && key >> (shift + 8) != prefix)) continue;
            atomicAdd(&counts[key >> shift & 255], 1u);
            atomicAdd(&masses[key >> shift & 255], mass_of(x));
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int bin = 255, last = 0;
            for (int low = 0; low < 256; low++) if (counts[low]) { last = low; break; }  // the last one takes what is left
            for (; bin > last; bin--) {
                if (counts[bin] && (count_before + counts[bin] >= most || mass_before + masses[bin] >= enough)) break;
                count_before += counts[bin];
                mass_before += masses[bin];
            }
            prefix = prefix << 8 | bin;
        }
        __syncthreads();
    }
    // All tokens of this key are equally likely.
    u64 each = mass_of(of_key(prefix));
    long long ties = prefix == within.key ? within.ties : (long long)counts[prefix & 255];
    ties = min(ties, most - count_before);
    if (each && enough > mass_before) {
        u64 wanted = (enough - mass_before - 1) / each + 1;
        if (wanted < (u64)ties) ties = (long long)wanted;
    } else if (enough <= mass_before) {
        ties = 1;
    }
    ties = max(ties, 1LL);
    Cut cut = {prefix, ties, mass_before + each * (u64)ties};
    __syncthreads();
    return cut;
}

// The lowest bound below which `ties` tokens have this key.
__device__ long long last_tie(const Row& row, u32 key, long long ties) {
    long long low = 0, high = row.V;
    while (low < high) {
        long long middle = (low + high) / 2, count = 0;
        for (long long token = threadIdx.x; token < middle; token += THREADS) count += key_of(scaled(row, token)) == key;
        if ((long long)(sum_of_block((float)count) + 0.5f) >= ties) high = middle; else low = middle + 1;
    }
    return low;
}

extern "C" __global__ void sample_kernel(const float* logits, const float* temperature, const int* top_k, const float* top_p, const float* min_p, const long long* seed, const long long* position, long long* token_out, float* logprob_out, long long V) {
    long long request = blockIdx.x;
    Row row = {logits + request * V, V, 0.f, temperature[request] > 0.f ? temperature[request] : 1.f};

    Best likeliest = {LOWEST, 0x7fffffff};
    for (long long token = threadIdx.x; token < V; token += THREADS) likeliest = better(likeliest, Best{row.logits[token], (int)token});
    likeliest = best_of_block(likeliest);
    row.largest = likeliest.value;
    float others = 0.f;
    for (long long token = threadIdx.x; token < V; token += THREADS)
        if (token != likeliest.index) others += expf(row.logits[token] - row.largest);
    others = sum_of_block(others);

    int chosen = likeliest.index;
    if (temperature[request] > 0.f) {
        long long k = top_k[request];
        Cut cut = {min_p[request] > 0.f ? key_of(logf(min_p[request])) : 0u, V, 0};
        bool filtered = min_p[request] > 0.f || k > 0 || top_p[request] < 1.f;
        long long bound = V;
        if (filtered) {
            Cut first = search(row, cut, k > 0 && k < V ? k : V, ~0ull);
            cut = first;
            if (top_p[request] < 1.f) cut = search(row, first, V, (u64)((double)top_p[request] * (double)first.mass));
            bound = last_tie(row, cut.key, cut.ties);
        }
        u64 s = (u64)seed[request];
        u32 low = (u32)s, high = (u32)(s >> 32), place = (u32)position[request];
        u32 first = mixed(mixed(mixed(low + 0x9E3779B9u) ^ high) ^ place);
        u32 second = mixed(mixed(mixed(high + 0x7F4A7C15u) ^ low) + place);
        Best drawn = {LOWEST, 0x7fffffff};
        for (long long token = threadIdx.x; token < V; token += THREADS) {
            float x = scaled(row, token);
            u32 key = key_of(x);
            if (filtered && (key < cut.key || (key == cut.key && token >= bound))) continue;
            drawn = better(drawn, Best{x + gumbel(first, second, (u32)token), (int)token});
        }
        chosen = best_of_block(drawn).index;
    }
    if (threadIdx.x == 0) {
        token_out[request] = chosen;
        logprob_out[request] = row.logits[chosen] - row.largest - log1pf(others);
    }
}
