"""CUDA C++ for the irregular ops, where Triton is weak: routing, stable counting and permutation, sampling.

The sources (*.cu) lie beside the Python that launches them; CuPy compiles them for the device at hand, by NVRTC or, on
AMD, HIPRTC (`torch.cuda._compile_kernel` where CuPy is not installed). They share their specifications, and so their
tests, with the Triton kernels of the same ops. Until they have agreed with those on a device they are asked last, which
means never: `dsv3 bench ops` times them, and the priority below is what a measured advantage would change.
"""

PRIORITY = -10  # behind Triton
FAMILIES = ("routing", "permutation", "sampling")


def modules() -> tuple[str, ...]:
    """What a backend imports to have these kernels. CuPy itself is asked for when one is launched."""
    return tuple(f"{__name__}.{family}" for family in FAMILIES)
