"""Is a vendor's library here, and is it the one that an adapter was written for?

A name proves nothing: `aiter` on PyPI is about asyncio, `deep-gemm` there lacks its kernels. A library counts by the
functions it has and, where its releases differ, by its version. Nothing is imported before somebody asks, and asking
never fails: whatever a library raises on import becomes the one line that says why it is not used (`REASONS`).
"""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from types import ModuleType
from typing import Any

import torch

from . import first_line

REASONS: dict[str, str] = {}  # provider -> why it is not used here; filled by asking
_found: dict[tuple[str, tuple[str, ...], str], ModuleType | str] = {}


class Unavailable(Exception):
    """Its text is the reason, one line."""


def find(module: str, attributes: tuple[str, ...], least_version: str = "") -> ModuleType:
    """The module, if it has all `attributes` and its package's `__version__` is `least_version` or later.

    Raises Unavailable otherwise. Looked up once: later calls cost a dictionary's look-up, so kernels may call it.
    """
    key = (module, attributes, least_version)
    if key not in _found:
        try:
            _found[key] = _search(module, attributes, least_version)
        except Unavailable as reason:
            _found[key] = str(reason)
    found = _found[key]
    if isinstance(found, str):
        raise Unavailable(found)
    return found


def _search(module: str, attributes: tuple[str, ...], least_version: str) -> ModuleType:
    package = module.partition(".")[0]
    if package not in sys.modules and find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")
    try:
        with redirect_stdout(sys.stderr):  # some libraries greet; standard output belongs to the caller
            library = import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # compiled code, other people's set-up scripts, sys.exit
        raise Unavailable(f"importing {module} failed: {first_line(error)}") from error
    missing = [name for name in attributes if not hasattr(library, name)]
    if missing:
        raise Unavailable(f"{module} has no {', '.join(missing)}: another package or release of that name")
    version = str(getattr(sys.modules[package], "__version__", ""))
    if _numbers(version) < _numbers(least_version):
        raise Unavailable(f"{package} {version or 'of unknown version'} is older than {least_version}")
    return library


def _numbers(version: str) -> tuple[int, ...]:
    """ "0.6.7rc1+cu13" -> (0, 6, 7): as much as two releases need to be put in order."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = part[: next((i for i, letter in enumerate(part) if not letter.isdigit()), len(part))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def available(provider: str, probe: Callable[[], object]) -> Callable[[], bool]:
    """`Kernel.available` of an adapter: does `probe` pass? Keeps its reason if it does not, whatever it raises."""

    def asked() -> bool:
        try:
            probe()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            REASONS[provider] = first_line(error)
            return False
        REASONS.pop(provider, None)
        return True

    return asked


def require_hopper() -> None:
    """Raise Unavailable unless the current device is an NVIDIA GPU of compute capability 9.0 (H100, H200, H20)."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise Unavailable("no NVIDIA GPU here")
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        raise Unavailable(f"made for Hopper (sm_90), this GPU is sm_{capability[0]}{capability[1]}")


def is_capturing() -> bool:
    """Is a graph of the current stream being captured, which freezes whatever is computed on the host?"""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def version_of(text: str | None) -> tuple[int, ...]:
    """The version of a part that torch was built with, as numbers; () for none."""
    return _numbers(text or "")


def takes(function: Callable[..., Any], *names: str) -> bool:
    """Does a Python function have parameters of these names?"""
    return set(names) <= set(signature(function).parameters)
