"""AMD GPUs; torch calls their device "cuda" too. The kernels are in ../triton; what differs by chip is in tables/.

ADAPTERS put vendors' libraries before them, where those are installed and take the arguments.
"""

import os
from pathlib import Path

import torch

from .. import Backend, cupy, triton

ADAPTERS = (f"{__name__}.aiter",)


def probe() -> str | None:
    if torch.version.hip is None:
        return f"torch {torch.__version__} is built without ROCm; install a ROCm build (pytorch.org/get-started)"
    if torch.cuda.is_available():
        return triton.why_not("rocm")
    if not Path("/dev/kfd").exists():
        return f"no AMD GPU driver is loaded (/dev/kfd is missing); install amdgpu-dkms for ROCm {torch.version.hip}"
    hidden = os.environ.get("HIP_VISIBLE_DEVICES", os.environ.get("ROCR_VISIBLE_DEVICES"))
    mend = (
        f"HIP_VISIBLE_DEVICES or ROCR_VISIBLE_DEVICES is {hidden!r}; unset it"
        if hidden is not None
        else ("check rocminfo, and that you are in the groups 'render' and 'video'")
    )
    return f"the AMD driver is there, but torch {torch.__version__} sees no GPU; {mend}"


BACKEND = Backend(
    name="rocm",
    device="cuda",
    probe=probe,
    kernels=triton.modules() + cupy.modules() + ADAPTERS,
    guarded=True,
    prepare=triton.sum_in_float32,
)
