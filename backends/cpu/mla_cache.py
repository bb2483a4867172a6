"""Decoding over the latent cache on the CPU.

All heads of a sequence share one key/value head, so they are the queries of one attention problem, and PyTorch's
blocked kernel takes latents as keys and as values alike (the last r columns of the result are dropped). It spreads
(batch, head) pairs over threads: a long context is cut into pieces that pose as a batch and are merged by their
log-sum-exp.
"""

import torch
from torch import Tensor

from ...ops.formats import BLOCK, num_blocks
from ...ops.mla_cache import mla_cache_gather, mla_decode

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

PIECE = 256  # fewest tokens worth a piece of their own
PADDED_BYTES = 64 << 20  # most memory that gathering a whole batch at once may take


def read_rows(rows: Tensor, kv_lora_rank: int, dtype: torch.dtype) -> Tensor:
    """`read_latent` with integer arithmetic instead of PyTorch's scalar FP8 conversion.

    An e4m3 byte shifted into the exponent and mantissa of a float16, sign extended, is its value / 256: exact,
    subnormals too. (The bytes of NaN come out as numbers; a cache never holds them in a row that is in use.)
    """
    if rows.dtype != torch.uint8:
        return rows.to(dtype)
    R, tiles = kv_lora_rank, num_blocks(kv_lora_rank)
    latent = rows.new_empty(*rows.shape[:-1], R + (rows.shape[-1] - R - 4 * tiles) // 2, dtype=torch.float32)
    half = rows[..., :R].view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4080)
    latent[..., :R] = half.view(torch.float16)
    scales = rows[..., R : R + 4 * tiles].contiguous().view(torch.float32) * 256.0
    for tile in range(tiles):
        latent[..., tile * BLOCK : min(tile * BLOCK + BLOCK, R)] *= scales[..., tile, None]
    latent[..., R:] = rows[..., R + 4 * tiles :].contiguous().view(torch.bfloat16)
    return latent.to(dtype)


def owned_rows(pages: Tensor, owned: list[int]) -> Tensor:
    """These pages end to end [len(owned) * page, ...]: a view where they are neighbours, else a copy."""
    first = owned[0]
    if owned == list(range(first, first + len(owned))):
        return pages[first : first + len(owned)].flatten(0, 1)
    return pages[owned].flatten(0, 1)


@mla_cache_gather.kernel("cpu", "torch")
def _mla_cache_gather(
    cache: list[Tensor], table: Tensor, lens: Tensor, cu_seqlens: Tensor, total: int, kv_lora_rank: int
) -> Tensor:
    pages, page = cache[0], cache[0].shape[1]
    dtype = torch.bfloat16 if pages.dtype == torch.uint8 else pages.dtype
    latent: Tensor | None = None
    starts = cu_seqlens.tolist()
    for owned, length, start, end in zip(table.tolist(), lens.tolist(), starts, starts[1:], strict=False):
        length = min(length, end - start)
        rows = read_rows(owned_rows(pages, owned[: max(-(-length // page), 1)])[:length], kv_lora_rank, dtype)
        if latent is None:
            latent = rows.new_zeros(total, rows.shape[1])
        latent[start : start + length] = rows
    assert latent is not None
    return latent


def _merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Pieces [P, 1, rows, D] and their log-sum-exp [P, 1, rows] -> the whole [1, 1, rows, D] and [1, 1, rows], f32."""
    lse = torch.logsumexp(lses, 0, keepdim=True)
    weight = (lses - lse).exp_()
    return (outs * weight[..., None]).sum(0, keepdim=True), lse


def _one_sequence(q: Tensor, latent: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [S, H, D], latent [L, D], L >= S -> (out [S, H, D], lse [S, H]).

    What all S queries see whole pieces of, without a mask; then the remaining tokens, with one. Of a short context, all
    of it with the mask: a second call and the merging would cost more.
    """
    (S, H, D), L = q.shape, latent.shape[0]
    shared = L if S == 1 else L - S
    pieces = max(min(torch.get_num_threads(), shared // PIECE), int(S == 1))
    rows, length = q.view(1, 1, S * H, D), shared // pieces if pieces else 0
    outs = []
    if length:
        kv = latent[: pieces * length].view(pieces, 1, length, D)
        outs.append(_flash(rows.expand(pieces, 1, S * H, D), kv, kv, 0.0, False, scale=scale))
    rest = L - pieces * length
    if rest:
        kv, mask = latent[L - rest :].view(1, 1, rest, D), None
        if S > 1:
            hidden = torch.arange(rest) > torch.arange(rest - S, rest)[:, None]  # [S, rest]
            mask = torch.zeros(S, rest, dtype=q.dtype).masked_fill_(hidden, float("-inf")).repeat_interleave(H, 0)
            mask = mask[None, None]
        outs.append(_flash(rows, kv, kv, 0.0, False, attn_mask=mask, scale=scale))
    out, lse = outs[0]
    if len(outs) + pieces > 2:
        out, lse = _merge(torch.cat([out for out, _ in outs]), torch.cat([lse for _, lse in outs]))
    return out.view(S, H, D), lse.view(S, H)


def _whole_batch(
    q: Tensor, pages: Tensor, table: Tensor, lens: Tensor, longest: int, scale: float, kv_lora_rank: int
) -> tuple[Tensor, Tensor]:
    """All sequences padded to the longest, one call: for many short contexts, where calls cost more than arithmetic.
    Each must hold its S new tokens at least."""
    B, S, H, D = q.shape
    page, token = pages.shape[1], torch.arange(longest, dtype=torch.int32)
    # What lies behind a sequence may be NaN, and 0 x NaN is NaN: its own last token stands there instead.
    place = torch.minimum(token, lens[:, None] - 1)  # [B, longest]
    if table.shape[1] == 1:
        slots = place.add_(table * page)
    else:
        slots = table.gather(1, (place // page).long()).mul_(page).add_(place % page)
    latent = read_rows(pages.flatten(0, 1).index_select(0, slots.view(-1)), kv_lora_rank, q.dtype)
    kv = latent.view(B, 1, longest, D)
    seen = lens[:, None, None] + torch.arange(1 - S, 1, dtype=torch.int32)[:, None]  # [B, S, 1]
    mask = torch.zeros(B, S, longest, dtype=q.dtype).masked_fill_(token >= seen, float("-inf"))
    mask = mask.expand(B, H, longest) if S == 1 else mask.repeat_interleave(H, 1)
    out, lse = _flash(q.view(B, 1, S * H, D), kv, kv, 0.0, False, attn_mask=mask[:, None], scale=scale)
    return out.view(B, S, H, D), lse.view(B, S, H)


@mla_decode.kernel("cpu", "torch")
def _mla_decode(
    q: Tensor,
    cache: list[Tensor],
    table: Tensor,
    lens: Tensor,
    lens_cpu: Tensor,
    plan: list[Tensor],
    scale: float,
    kv_lora_rank: int,
) -> tuple[Tensor, Tensor]:
    (B, S, H, D), R, pages = q.shape, kv_lora_rank, cache[0]
    page, lengths, q = pages.shape[1], lens_cpu.tolist(), q.contiguous()
    longest, padded = max(lengths), B * max(lengths)
    short = padded <= 2 * sum(lengths) and padded * D * q.itemsize <= PADDED_BYTES
    if B > 1 and short and min(lengths) >= S:
        out, lse = _whole_batch(q, pages, table, lens, longest, scale, R)
        return out[..., :R].contiguous(), lse.contiguous()
    out = q.new_zeros(B, S, H, R)
    lse = q.new_full((B, S, H), float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
    for b, (length, owned) in enumerate(zip(lengths, table.tolist(), strict=True)):
        if length == 0:
            continue
        latent = read_rows(owned_rows(pages, owned[: -(-length // page)])[:length], R, q.dtype)
        blind = max(S - length, 0)  # leading queries from before the sequence's first token
        one, one_lse = _one_sequence(q[b, blind:], latent, scale)
        out[b, blind:], lse[b, blind:] = one[..., :R], one_lse
    return out, lse
