"""The abstract op set: what a DeepSeek-V3 computes, as specifications that every backend is held to."""

from importlib import import_module
from pkgutil import iter_modules

from .op import OPS, Op


def load() -> dict[str, Op]:
    """Every op by name, of all families."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return OPS
