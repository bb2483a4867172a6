"""How ops are computed: the registry of backends.

A backend is a name, the torch device that its tensors live on, a probe that says whether this machine can run it, and
the modules whose import registers its kernels. An op without a kernel runs its specification on that device.

Other packages add backends, or kernels to the built-in ones, by an entry point of the group `dsv3.backends` that names
a `Backend`. One of a new name is a new backend; one of a known name adds its kernels to the backend that is there.
"""

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module, metadata

import torch

from ..errors import UserError
from ..ops import op as mechanism
from ..ops.cache_layout import LAYOUTS, CacheLayout, LatentDims, fused_layout
from ..ops.op import active_backend, set_backend

GROUP = "dsv3.backends"
BUILT_IN = ("cuda", "rocm", "ascend", "cpu")  # "auto" takes the first that is usable; those of others go by name only
BY_NAME = ("cpu-invariant",)  # built in as well, but taken only when asked for


@dataclass(frozen=True)
class Backend:
    """See the module's docstring.

    probe: None when this machine can run it, else one line: why not, and what to do about it.
    kernels: names of the modules to import on activation.
    layout: (config, dtype) -> how this backend's kernels want the latent cache.
    guarded: its kernels read memory by the sizes they are told, so the ops check shapes before they run.
    prepare: what its kernels ask of the process besides, done when the backend is activated and not before.
    remark: what else `dsv3 doctor` says of one that is usable.
    """

    name: str
    device: str
    probe: Callable[[], str | None]
    kernels: tuple[str, ...] = ()
    layout: Callable[[LatentDims, torch.dtype], CacheLayout] = fused_layout
    guarded: bool = False
    prepare: Callable[[], None] = lambda: None
    remark: Callable[[], str] = lambda: ""

    def why_not(self) -> str | None:
        """None when usable, else the reason; a probe that fails is a reason too."""
        try:
            return self.probe()
        except Exception as error:  # the probe runs other people's drivers
            return f"looking for it failed: {first_line(error)}"

    def load(self) -> None:
        """Register the kernels and the cache layout, without asking whether they can run here."""
        LAYOUTS[self.name] = self.layout
        if self.guarded:
            mechanism.GUARDED.add(self.name)
        for module in self.kernels:
            import_module(module)


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, for messages of one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _broken(name: str, error: Exception) -> Backend:
    reason = f"its entry point cannot be loaded ({first_line(error)}); mend or uninstall that package"
    return Backend(name, "cpu", lambda: reason)


@cache
def discover() -> dict[str, Backend]:
    """Every backend known here, usable or not: the built-in ones, first those of "auto" in order, then others'."""
    modules = {name: f"{__name__}.{name.replace('-', '_')}" for name in (*BUILT_IN, *BY_NAME)}
    backends = {name: import_module(module).BACKEND for name, module in modules.items()}
    for entry in metadata.entry_points(group=GROUP):
        try:
            plugin = entry.load()
            if not isinstance(plugin, Backend):
                raise TypeError(f"{entry.value} is not a dsv3.backends.Backend")
        except Exception as error:  # a broken plug-in must not take down the rest
            backends.setdefault(entry.name, _broken(entry.name, error))
            continue
        known = backends.get(plugin.name)
        backends[plugin.name] = replace(known, kernels=known.kernels + plugin.kernels) if known else plugin
    return backends


_active: Backend | None = None


def activate(name: str = "auto") -> Backend:
    """Make a backend the one of this process: probe the machine, register the kernels, set the ops to it.

    name: "auto" (the active one, else the first usable one) or a backend's name. Activating again is free. Raises
    UserError for an unknown name, a backend that this machine cannot run, and when another one is active.
    """
    global _active
    backends = discover()
    if name != "auto" and name not in backends:
        close = difflib.get_close_matches(name, ["auto", *backends], 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are auto, {', '.join(backends)}"
        raise UserError(f"unknown backend {name!r}; {hint}")
    if _active is not None:
        if name not in ("auto", _active.name):
            raise UserError(
                f"backend {_active.name!r} is active in this process and stays so; start another process for {name!r}"
            )
        return _active
    backend = _first_usable(backends) if name == "auto" else backends[name]
    reason = None if name == "auto" else backend.why_not()
    if reason is not None:
        raise UserError(f"backend {name!r} is not usable: {reason}; or use --backend cpu")
    backend.load()
    backend.prepare()
    set_backend(backend.name)
    _active = backend
    return backend


# Core says `activate_backend(name)` without knowing this package.
mechanism.activator = activate


def _first_usable(backends: dict[str, Backend]) -> Backend:
    return next(backends[name] for name in BUILT_IN if backends[name].why_not() is None)


@contextmanager
def use_backend(name: str) -> Iterator[Backend]:
    """Run the ops of a `with` block on another backend than the process's; same errors as `activate`.

    Process-wide while it lasts, like the backend itself: for tests and comparisons, not for threads.
    """
    global _active
    previous, before, _active = _active, active_backend(), None
    try:
        yield activate(name)
    finally:
        _active = previous
        set_backend(before)
