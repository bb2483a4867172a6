"""The kernels that the backends cuda and rocm share, in Triton; one file per family of ops.

Not a backend by itself. Importing a family registers its kernels with both backends; what differs between the chips is
data: `target.py` says what a chip can do, and tables/<chip>.json of either backend how large its tiles are. A kernel
runs compiled on a GPU, interpreted on a CPU (TRITON_INTERPRET=1 before Triton is imported; how the tests hold it to its
specification), and is compiled ahead of time for every chip without having one (`aot.py`).

Rules of a kernel, each paid for once:
- It widens to float32 before any arithmetic. Sums run in float32, indices that are multiplied by a stride in int64.
- It never needs a value on the host: sizes come from shapes, everything else stays on the device.
- What lies behind the last token of a page, a segment or a capacity may be NaN: select with `where`, never multiply.
- Its launcher goes through `runtime.launch`, which is also what the ahead-of-time compiler listens to.
"""

from importlib.util import find_spec

import torch

FAMILIES = (
    "quantize",
    "fp8_gemm",
    "grouped_gemm",
    "wgrad",
    "blas",
    "attention",
    "attention_backward",
    "merge",
    "latent_cache",
    "decode",
    "routing",
    "permutation",
    "expert_parallel",
    "norms",
    "norm_quantize",
    "elementwise",
    "loss",
    "sampling",
)


def modules() -> tuple[str, ...]:
    """What a backend imports to have these kernels; without Triton, which the probe misses, the graphs alone."""
    families = FAMILIES if find_spec("triton") else ()
    return tuple(f"{__name__}.{module}" for module in ("graphs", *families))


def sum_in_float32() -> None:
    """Forbid torch, in this process, to reduce the partial sums of 16-bit products in 16 bits: `blas` promises float32.

    Whether float32 is multiplied as TF32 is torch's switch as well (`torch.backends.cuda.matmul`), and off by default.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def why_not(extra: str) -> str | None:
    """What keeps these kernels from running on the current GPU, and what to do; None if nothing does.

    extra: of the package, with what the backend wants.
    """
    if find_spec("triton") is None:
        return f"Triton is not installed; pip install 'dsv3[{extra}]'"
    from .target import current_target

    try:
        current_target()
    except LookupError as error:
        return f"the kernels do not know this GPU: {error.args[0]}; choose another with CUDA_VISIBLE_DEVICES"
    return None
