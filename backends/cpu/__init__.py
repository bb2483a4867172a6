"""Kernels for the CPU. Importing the package registers them: this is the backend of a process that chose none."""

from pkgutil import walk_packages

from .. import Backend


def _remark() -> str:
    from .native import extension

    if extension is None:
        return (
            "without its C++ kernels, which makes small models slow: install g++ and Python's headers, then dsv3 anew"
        )
    return f"C++ kernels for {extension.__name__.rpartition('_')[2]}"


BACKEND = Backend(
    name="cpu",
    device="cpu",
    probe=lambda: None,
    kernels=tuple(
        module.name
        for module in walk_packages(__path__, f"{__name__}.")
        if not module.name.rpartition(".")[2].startswith("_")  # built for a CPU that this one may not be
    ),
    remark=_remark,
)
BACKEND.load()
