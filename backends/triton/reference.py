"""Ops that run as their specifications on GPUs on purpose, and why. A test holds the list to the registered kernels."""

REASONS = {
    "all_reduce": "the specification is the call of the transport (NCCL, RCCL) itself",
    "all_gather": "the specification is the call of the transport (NCCL, RCCL) itself",
    "reduce_scatter": "the specification is the call of the transport (NCCL, RCCL) itself",
    "all_to_all": "the specification is the call of the transport (NCCL, RCCL) itself",
}
