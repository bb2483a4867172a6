"""cuDNN's attention through torch: head dimensions 192 / 128, on Hopper.

Signatures: torch 2.13, aten::_scaled_dot_product_cudnn_attention and its backward; pytorch 02a4a0f,
aten/.../cudnn/MHA.cpp. Queries, keys and values are [B, H, T, ...] with any strides but the last, the log-sum-exp is a
natural one, f32 [B, H, T, 1] (in older releases [B, H, T]); the causal mask is aligned to the beginning.

Taken for one sequence of many tokens, causal, where queries and keys are the same positions: then the alignment of the
mask is the same, and rows behind the sequence's end, which the host does not know, are seen by no row before it. They
are overwritten afterwards. More sequences are not taken: whether they are equally long is known on the device only, and
for ragged ones torch gives cuDNN wrong offsets of the output and of the log-sum-exp where the dimensions of keys and
values differ (MHA.cpp, run_cudnn_SDP_fprop_nestedtensor).

It pays from LEAST_TOKENS on. cuDNN wants the rotary key for every head, so the keys are written once more, and the rows
behind the end are another pass: 0.2 ms and more at 8,192 tokens and 128 heads, of 5 ms for the attention itself.
"""

from typing import Any

import torch
from torch import Tensor

from ...ops.mla import mla_attention, mla_attention_backward
from ..probing import Unavailable, available, require_hopper

LEAST_TOKENS = 8192
LEAST_CUDNN = 91100  # which has 192 / 128 forward and backward on Hopper
UNSEEN = 1e30  # a log-sum-exp that makes every probability of its row 0, and no NaN as -inf would

_forward: Any = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward: Any = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def _probe() -> None:
    require_hopper()
    version = torch.backends.cudnn.version() or 0
    if version < LEAST_CUDNN:
        raise Unavailable(f"cuDNN {version} is older than {LEAST_CUDNN}")


_AVAILABLE = available("cudnn", _probe)


def _supports(
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
) -> bool:
    return (
        causal
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.dtype == k_nope.dtype == k_rope.dtype == v.dtype
        and (q.shape[2], v.shape[2]) == (192, 128)
        and q.shape[0] == k_nope.shape[0] >= LEAST_TOKENS
        and cu_seqlens_q.shape[0] == 2
        and cu_seqlens_q.data_ptr() == cu_seqlens_k.data_ptr()  # the same tensor, so the same lengths
    )


def _batch(x: Tensor) -> Tensor:
    """[T, H, d] -> [1, H, T, d], the last dimension contiguous."""
    return (x if x.stride(2) == 1 else x.contiguous()).transpose(0, 1)[None]


def _keys(k_nope: Tensor, k_rope: Tensor) -> Tensor:
    """[T, H, n] and [T, r] -> [T, H, n + r]"""
    return torch.cat([k_nope, k_rope[:, None].expand(-1, k_nope.shape[1], -1)], 2)


def _behind(cu_seqlens: Tensor, T: int) -> Tensor:
    """bool [T, 1]: rows of no sequence."""
    return (torch.arange(T, device=cu_seqlens.device) >= cu_seqlens[1])[:, None]


@mla_attention.kernel("cuda", "cudnn", priority=20, available=_AVAILABLE, supports=_supports, checked="emulated")
def mla_attention_cudnn(
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    T, H, _ = q.shape
    keys = _batch(_keys(k_nope, k_rope))
    out, lse, *_ = _forward(_batch(q), keys, _batch(v), None, True, 0.0, True, False, scale=scale)
    behind = _behind(cu_seqlens_q, T)
    out = out[0].transpose(0, 1).contiguous()
    lse = lse.reshape(H, T).T.contiguous()
    return out.masked_fill_(behind[..., None], 0.0), lse.masked_fill_(behind, float("-inf"))


def _supports_backward(grad_out: Tensor, grad_lse: Tensor | None, *rest: Any) -> bool:
    q, k_nope, k_rope, v, _, _, *others = rest
    return grad_lse is None and grad_out.dtype == q.dtype and _supports(q, k_nope, k_rope, v, *others)


@mla_attention_backward.kernel(
    "cuda", "cudnn", priority=20, available=_AVAILABLE, supports=_supports_backward, checked="emulated"
)
def mla_attention_backward_cudnn(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, n = q.shape[0], k_nope.shape[2]
    known = lse.masked_fill(_behind(cu_seqlens_q, T), UNSEEN).T.contiguous()[None, ..., None]  # [1, H, T, 1]
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)  # of a dropout that there is not
    of_q, of_k, of_v = _backward(
        _batch(grad_out), _batch(q), _batch(_keys(k_nope, k_rope)), _batch(v), _batch(out), known,
        nothing, nothing, None, None, None, T, T, 0.0, True, scale=scale,
    )  # fmt: skip
    of_q, of_k, of_v = (grad[0].transpose(0, 1) for grad in (of_q, of_k, of_v))
    of_rope = of_k[..., n:].sum(1, dtype=torch.float32).to(k_rope.dtype)
    return of_q.contiguous(), of_k[..., :n].contiguous(), of_rope, of_v.contiguous()
