// What AMD's compiler lacks or spells otherwise. A wavefront of 64 plays two warps of 32.
#define __shfl_sync(mask, value, from) __shfl(value, from, 32)
#define __shfl_xor_sync(mask, value, by) __shfl_xor(value, by, 32)
#define __syncwarp() (__builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront"), __builtin_amdgcn_wave_barrier())
#define __match_any_sync(mask, value) peers_of(value)

static __device__ unsigned peers_of(int value) {
    unsigned peers = 0;
    for (int lane = 0; lane < 32; lane++) peers |= (unsigned)(__shfl(value, lane, 32) == value) << lane;
    return peers;
}
