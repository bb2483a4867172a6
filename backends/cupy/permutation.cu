// A stable counting sort of (token, choice) pairs by expert, and the copying of rows that it decides. A block of one warp
// takes CHUNK pairs in order. Macros: EXPERTS, CHUNK, ALIGN.
#define FULL 0xffffffffu

// idx i32 [pairs] -> counts i32 [blocks, EXPERTS]: how many of a block's pairs chose each expert.
extern "C" __global__ void count_kernel(const int* idx, int* counts, long long pairs) {
    __shared__ int histogram[EXPERTS];
    for (int e = threadIdx.x; e < EXPERTS; e += 32) histogram[e] = 0;
    __syncwarp();
    long long first = (long long)blockIdx.x * CHUNK;
    for (long long p = first + threadIdx.x; p < first + CHUNK && p < pairs; p += 32) atomicAdd(&histogram[idx[p]], 1);
    __syncwarp();
    for (int e = threadIdx.x; e < EXPERTS; e += 32) counts[(long long)blockIdx.x * EXPERTS + e] = histogram[e];
}

// counts -> in their place the first row of each block's pairs of each expert; offsets i32 [EXPERTS + 1]. One block.
extern "C" __global__ void scan_kernel(int* counts, int* offsets, long long blocks) {
    __shared__ int starts[EXPERTS + 1];
    for (int e = threadIdx.x; e < EXPERTS; e += blockDim.x) {
        int total = 0;
        for (long long b = 0; b < blocks; b++) total += counts[b * EXPERTS + e];
        starts[e + 1] = (total + ALIGN - 1) / ALIGN * ALIGN;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        starts[0] = 0;
        for (int e = 0; e < EXPERTS; e++) starts[e + 1] += starts[e];
    }
    __syncthreads();
    for (int e = threadIdx.x; e < EXPERTS; e += blockDim.x) {
        int next = starts[e];
        for (long long b = 0; b < blocks; b++) {
            int count = counts[b * EXPERTS + e];
            counts[b * EXPERTS + e] = next;
            next += count;
        }
    }
    for (int e = threadIdx.x; e <= EXPERTS; e += blockDim.x) offsets[e] = starts[e];
}

// idx, first rows as scan_kernel left them -> row_map i32 [pairs]; source i32 [rows]: the pair of each row, where it has one.
extern "C" __global__ void place_kernel(const int* idx, const int* firsts, int* row_map, int* source, long long pairs) {
    __shared__ int next[EXPERTS];
    for (int e = threadIdx.x; e < EXPERTS; e += 32) next[e] = firsts[(long long)blockIdx.x * EXPERTS + e];
    __syncwarp();
    long long first = (long long)blockIdx.x * CHUNK;
    for (int step = 0; step < CHUNK; step += 32) {
        long long p = first + step + threadIdx.x;
        int expert = p < pairs ? idx[p] : -1;
        unsigned peers = __match_any_sync(FULL, expert);
        int rank = __popc(peers & ((1u << threadIdx.x) - 1));
        int row = expert < 0 ? -1 : next[expert] + rank;
        __syncwarp();
        if (expert >= 0 && rank == 0) next[expert] += __popc(peers);
        __syncwarp();
        if (expert >= 0) {
            row_map[p] = row;
            source[row] = (int)p;
        }
    }
}

// Row r of `out` is row source[r] / choices of `x`, or zeros where source[r] < 0; `bytes` of a row, a block each.
extern "C" __global__ void rows_kernel(const unsigned char* x, const int* source, unsigned char* out, long long bytes, long long choices) {
    long long row = blockIdx.x;
    int pair = source[row];
    const unsigned char* from = x + (pair < 0 ? 0 : pair / choices) * bytes;
    unsigned char* to = out + row * bytes;
    if (bytes % 16 == 0 && ((unsigned long long)x | (unsigned long long)out) % 16 == 0) {
        for (long long i = threadIdx.x; i < bytes / 16; i += blockDim.x)
            ((uint4*)to)[i] = pair < 0 ? uint4{0, 0, 0, 0} : ((const uint4*)from)[i];
    } else {
        for (long long i = threadIdx.x; i < bytes; i += blockDim.x) to[i] = pair < 0 ? 0 : from[i];
    }
}
