"""What of torch needs an NVIDIA GPU: scaled_mm with block scales, cuDNN's attention.

Each call goes to torch's own shape checks on the meta device first: its signature is the installed torch's.
"""

import torch
from torch.nn import functional
from torch.nn.functional import ScalingType

from dsv3.ops.fp8 import fp8_gemm

REAL = functional.scaled_mm
CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention
CUDNN_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def on_meta(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, torch.Tensor) else x


def scaled_mm(mat_a, mat_b, scale_a, scale_recipe_a, scale_b, scale_recipe_b, output_dtype=torch.bfloat16):
    tensors = mat_a, mat_b, scale_a, scale_b
    a, b, sa, sb = map(on_meta, tensors)
    checked = REAL(a, b, sa, scale_recipe_a, sb, scale_recipe_b, output_dtype=output_dtype)
    (M, K), N = mat_a.shape, mat_b.shape[1]
    kinds = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    assert (scale_recipe_a, scale_recipe_b) == kinds and output_dtype == torch.bfloat16
    assert mat_a.is_contiguous() and mat_b.T.is_contiguous() and K % 16 == 0 and N % 16 == 0 and M % 4 == 0
    Kb, Nb = -(-K // 128), -(-N // 128)
    padded = -(-Kb // 4) * 4
    assert tuple(scale_a.shape) == (M, Kb) and scale_a.stride() == (1, M)
    assert tuple(scale_b.shape) == (padded, Nb) and scale_b.stride() == (1, padded)
    out = fp8_gemm.spec(mat_a, scale_a, mat_b.T, scale_b[:Kb].T, output_dtype)
    assert out.shape == checked.shape and out.dtype == checked.dtype
    return out


def check_heads(*tensors):
    for x in tensors:
        assert x.dim() == 4 and x.shape[0] == 1 and x.stride(3) == 1 and x.dtype in (torch.bfloat16, torch.float16)


def logits_of(query, key, scale):
    """float32 [1, H, T, T], its mask aligned to the beginning."""
    return (query.float() @ key.float().mT * scale).masked_fill(
        ~torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(), float("-inf")
    )


def cudnn_forward(
    query,
    key,
    value,
    attn_bias,
    compute_log_sumexp,
    dropout_p=0.0,
    is_causal=False,
    return_debug_mask=False,
    *,
    scale=None,
):
    check_heads(query, key, value)
    rest = attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask
    assert rest == (None, True, 0.0, True, False) and scale is not None
    checked = CUDNN(*map(on_meta, (query, key, value)), *rest, scale=scale)
    logits = logits_of(query, key, scale)
    lse = logits.logsumexp(-1, keepdim=True)
    out = torch.empty_strided(checked[0].shape, checked[0].stride(), dtype=query.dtype)
    out.copy_((logits - lse).exp() @ value.float())
    assert lse.shape == checked[1].shape
    return out, lse, None, None, query.shape[2], key.shape[2], torch.zeros(()), torch.zeros(()), None


def cudnn_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    philox_seed,
    philox_offset,
    attn_bias,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    *,
    scale=None,
):
    check_heads(grad_out, query, key, value, out)
    tensors = grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset
    rest = attn_bias, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal
    assert rest == (None, None, None, query.shape[2], key.shape[2], 0.0, True)
    assert tuple(logsumexp.shape) == (*query.shape[:3], 1) and logsumexp.is_contiguous()
    CUDNN_BACKWARD(*map(on_meta, tensors), *rest, scale=scale)
    p = (logits_of(query, key, scale) - logsumexp).exp()
    grad, delta = grad_out.float(), (grad_out.float() * out.float()).sum(-1, keepdim=True)
    of_logits = p * (grad @ value.float().mT - delta) * scale
    grads = of_logits @ key.float(), of_logits.mT @ query.float(), p.mT @ grad
    return tuple(grad.to(query.dtype) for grad in grads)
