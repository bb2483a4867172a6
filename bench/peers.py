"""What others offer for the same ops, timed beside our kernels where it is installed.

Libraries that a backend has adapters for are kernels already; here are those that nobody would call from a model.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch

from ..ops.op import Op

Call = Callable[[], Any]


def peers_of(op: Op, args: tuple[Any, ...], device: str) -> Iterator[tuple[str, Call]]:
    """Names and calls, ready to be timed."""
    if device == "cpu":
        return
    if "group" not in op.signature.parameters:
        compiled = torch.compile(op.spec)
        yield "torch.compile", lambda: compiled(*args)
    make = LIGER.get(op.name)
    if make is not None and find_spec("liger_kernel") is not None:
        yield "liger", make(*args)


def _liger_loss(h: torch.Tensor, w: torch.Tensor, target: torch.Tensor, temperature: float) -> Call:
    """The mean loss; it computes the gradients on the way forward, so hold it against forward and backward of ours."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    h, w = (tensor.detach().requires_grad_() for tensor in (h, w))
    return lambda: LigerFusedLinearCrossEntropyFunction.apply(h, w, target)


def _liger_norm(x: torch.Tensor, w: torch.Tensor, eps: float) -> Call:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda: LigerRMSNormFunction.apply(x, w, eps)


def _liger_swiglu(gate_up: torch.Tensor, weight: torch.Tensor | None) -> Call:
    """Without the routing weight, which it does not know."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up = (half.contiguous() for half in gate_up.chunk(2, -1))
    return lambda: LigerSiLUMulFunction.apply(gate, up)


LIGER: dict[str, Callable[..., Call]] = {
    "linear_cross_entropy": _liger_loss,
    "rms_norm": _liger_norm,
    "swiglu": _liger_swiglu,
}
