"""NVIDIA GPUs. The kernels are in ../triton; what differs by chip is in tables/.

ADAPTERS put vendors' libraries before them, where those are installed and take the arguments.
"""

import os
import warnings
from pathlib import Path

import torch

from .. import Backend, cupy, first_line, triton

ADAPTERS = tuple(
    f"{__name__}.{name}" for name in ("cudnn", "deep_ep", "deep_gemm", "flash_mla", "flashinfer", "scaled_mm")
)


def probe() -> str | None:
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is a ROCm build; use --backend rocm, or install a CUDA build of torch"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build (pytorch.org/get-started)"
    with warnings.catch_warnings(record=True) as caught:  # torch tells of an old driver by a warning
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return triton.why_not("cuda")
    if caught:
        return f"torch {torch.__version__} finds no GPU: {first_line(caught[0].message)}"  # type: ignore[arg-type]
    if not Path("/proc/driver/nvidia/version").exists():
        return f"no NVIDIA driver is loaded; install one that runs CUDA {torch.version.cuda} (nvidia-smi shows it)"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    mend = f"CUDA_VISIBLE_DEVICES is {hidden!r}; unset it" if hidden is not None else "check that nvidia-smi lists one"
    return f"the NVIDIA driver is there, but torch {torch.__version__} sees no GPU; {mend}"


BACKEND = Backend(
    name="cuda",
    device="cuda",
    probe=probe,
    kernels=triton.modules() + cupy.modules() + ADAPTERS,
    guarded=True,
    prepare=triton.sum_in_float32,
)
