"""Ops that run as their specifications on GPUs on purpose, and why. A test holds the list to the registered kernels."""

REASONS = {
    "mla_decode_plan": "our decoding shares its work out on the device, by a sum over the lengths; vendors plan anew",
    "sequence_balance_loss": "two dozen passes over [T, E], less than a hundredth of the layer that it belongs to",
    "sequence_balance_loss_backward": "as sequence_balance_loss",
    "all_reduce": "the specification is the call of the transport (NCCL, RCCL) itself",
    "all_gather": "the specification is the call of the transport (NCCL, RCCL) itself",
    "reduce_scatter": "the specification is the call of the transport (NCCL, RCCL) itself",
    "all_to_all": "the specification is the call of the transport (NCCL, RCCL) itself",
}
