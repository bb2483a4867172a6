"""The latent cache and attention over it, in the absorbed form (report, section 2.1.1; FlashMLA's byte layout).

A token takes kv_lora_rank (R) + qk_rope_head_dim (r) numbers per layer, and nothing else. A cache is a list of tensors,
so that a backend may lay it out otherwise; here it is one tensor of pages:
- real numbers: [P, page, R + r], latent first;
- FP8: uint8 [P, page, R + 4 ceil(R/128) + 2 r]: R values e4m3, their scales f32 (one per tile of 128), r values bf16,
  little-endian; 656 bytes for 512 + 64. R is at most 128 or a multiple of it.
Token i of sequence b lies in page table[b, i // page], at offset i % page. Entries of the table behind a sequence's
last page are ignored, and so is what lies behind its last token, NaN included.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .formats import BLOCK, E4M3, FP8_MAX, num_blocks
from .op import Near, op

# Of the first tensor of a cache. How wide a row is for latents of R + r, only its dtype says.
PAGES = ("P page width",)


def fp8_latent_bytes(kv_lora_rank: int, rope_dim: int) -> int:
    """Bytes of one token in an FP8 cache: 656 for 512 + 64."""
    return kv_lora_rank + 4 * num_blocks(kv_lora_rank) + 2 * rope_dim


def fp8_latent_rank(latent_dim: int, token_bytes: int) -> int:
    """kv_lora_rank of an FP8 cache of `token_bytes` per token that holds latents of R + r = `latent_dim` numbers."""
    own = 2 * latent_dim - token_bytes  # R - 4 ceil(R/128)
    return own + 4 if own <= BLOCK - 4 else own // (BLOCK - 4) * BLOCK


def encode_fp8_latent(latent: Tensor, token_bytes: int) -> Tensor:
    """latent [T, R + r] real -> uint8 [T, token_bytes]. A tile's scale is its largest magnitude / 448, or 1 for 0."""
    R = fp8_latent_rank(latent.shape[1], token_bytes)
    real = latent.to(torch.float32)
    tiles = pad(real[:, :R], (0, num_blocks(R) * BLOCK - R)).unflatten(1, (-1, BLOCK))
    scales = tiles.abs().amax(-1) / FP8_MAX[E4M3]  # [T, R/128]
    scales = torch.where(scales > 0, scales, 1.0)
    values = (tiles / scales[..., None]).clamp(-FP8_MAX[E4M3], FP8_MAX[E4M3]).to(E4M3).flatten(1)[:, :R].contiguous()
    rope = latent[:, R:].to(torch.bfloat16).contiguous()
    return torch.cat([values.view(torch.uint8), scales.view(torch.uint8), rope.view(torch.uint8)], 1)


def decode_fp8_latent(rows: Tensor, kv_lora_rank: int, dtype: torch.dtype) -> Tensor:
    """uint8 [..., token_bytes] -> latents [..., R + r], multiplied out in float32 at least."""
    R, S = kv_lora_rank, 4 * num_blocks(kv_lora_rank)
    real = torch.promote_types(dtype, torch.float32)
    values = rows[..., :R].contiguous().view(E4M3).to(real)
    scales = rows[..., R : R + S].contiguous().view(torch.float32).to(real)
    rope = rows[..., R + S :].contiguous().view(torch.bfloat16).to(real)
    values = values * scales.repeat_interleave(BLOCK, -1)[..., :R]
    return torch.cat([values, rope], -1).to(dtype)


def read_latent(rows: Tensor, kv_lora_rank: int, dtype: torch.dtype) -> Tensor:
    """Rows of a cache of either form -> latents [..., R + r]."""
    return decode_fp8_latent(rows, kv_lora_rank, dtype) if rows.dtype == torch.uint8 else rows.to(dtype)


@op(
    shapes={"cache": PAGES, "slots": "T", "latent": "T latent_dim"},
    tolerance=0.0,
    mutates=("cache",),
    cost=lambda cache, slots, latent: (0, 2 * latent.nbytes),
)
def mla_cache_write(cache: list[Tensor], slots: Tensor, latent: Tensor) -> None:
    """Store the latents of new tokens.

    cache: one tensor of pages (module docstring), written in place; slots i64 [T], page number * page + offset, all
    different; latent [T, R + r].
    """
    pages = cache[0]
    rows = encode_fp8_latent(latent, pages.shape[2]) if pages.dtype == torch.uint8 else latent.to(pages.dtype)
    pages.flatten(0, 1).index_copy_(0, slots, rows)


@op(
    shapes={"cache": PAGES, "table": "B W", "lens": "B", "cu_seqlens": "B+1"},
    tolerance=0.0,
    cost=lambda cache, table, lens, cu, total, kv_lora_rank: (0, 2 * total * cache[0].shape[2] * cache[0].itemsize),
)
def mla_cache_gather(
    cache: list[Tensor], table: Tensor, lens: Tensor, cu_seqlens: Tensor, total: int, kv_lora_rank: int
) -> Tensor:
    """Latents of cached tokens as contiguous rows, to be expanded for chunked prefill.

    table i32 [B, W], lens i32 [B] cached tokens of each sequence, cu_seqlens i32 [B + 1] where its rows begin,
    total = number of rows -> [total, R + r] in the cache's dtype (bf16 for FP8). Rows that hold no token are 0.
    """
    pages = cache[0]
    page, last = pages.shape[1], table.shape[0] - 1
    rows = torch.arange(total, device=table.device, dtype=cu_seqlens.dtype)
    owner = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    sequence = owner.clamp(max=last)
    token = rows - cu_seqlens[sequence]
    valid = (owner <= last) & (token < lens[sequence])
    token = torch.where(valid, token, 0)
    slot = torch.where(valid, table[sequence, token // page] * page + token % page, 0)
    dtype = torch.bfloat16 if pages.dtype == torch.uint8 else pages.dtype
    latent = read_latent(pages.flatten(0, 1)[slot], kv_lora_rank, dtype)
    return torch.where(valid[:, None], latent, 0.0)  # not a product: a stale row may be NaN


@op(tolerance=0.0, cost=lambda lens, num_heads, page: (0, 2 * lens.nbytes))
def mla_decode_plan(lens: Tensor, num_heads: int, page: int) -> list[Tensor]:
    """What mla_decode wants to know about a step, computed once for all layers; lens i32 [B], new tokens included.

    The content belongs to the backend (FlashMLA's tile schedule, FlashInfer's plan). Here: pages in use, i32 [B].
    """
    return [(lens + (page - 1)) // page]


def _decode_cost(
    q: Tensor,
    cache: list[Tensor],
    table: Tensor,
    lens: Tensor,
    lens_cpu: Tensor,
    plan: list[Tensor],
    scale: float,
    kv_lora_rank: int,
) -> tuple[int, int]:
    tokens, S, H, D = int(lens_cpu.sum()), q.shape[1], q.shape[2], q.shape[3]
    moved = tokens * cache[0].shape[2] * cache[0].itemsize + 2 * q.nbytes
    return 2 * S * H * tokens * (D + kv_lora_rank), moved


@op(
    shapes={"q": "B S H latent_dim", "cache": PAGES, "table": "B W", "lens": "B", "lens_cpu": "B", "plan": ()},
    tolerance=(Near(2e-6, 8e-3), Near(2e-6, 8e-3)),
    cost=_decode_cost,
)
def mla_decode(
    q: Tensor,
    cache: list[Tensor],
    table: Tensor,
    lens: Tensor,
    lens_cpu: Tensor,
    plan: list[Tensor],
    scale: float,
    kv_lora_rank: int,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest S tokens of each sequence over its latents: one key/value head shared by all queries.

    q [B, S, H, R + r], absorbed (q_nope W_UK, then q_rope); cache and table as in the module docstring, with the new
    tokens already written; lens i32 [B] counts them; lens_cpu is a copy of lens on the host; plan is mla_decode_plan's
    -> (weighted latents [B, S, H, R], log-sum-exp f32 [B, S, H]).
    Causal among the new tokens: query s sees the first lens - S + s + 1. One that sees nothing: 0 and -inf.
    """
    S, R = q.shape[1], kv_lora_rank
    real, pages = torch.promote_types(q.dtype, torch.float32), cache[0]
    page, W = pages.shape[1], table.shape[1]
    in_use = torch.arange(W, device=table.device)[None] * page < lens[:, None]
    rows = pages[torch.where(in_use, table, 0)].flatten(1, 2)  # [B, W * page, ...]
    token = torch.arange(W * page, device=table.device)
    latent = read_latent(rows, R, real)
    latent = torch.where((token < lens[:, None])[..., None], latent, 0.0)  # not a product: a stale row may be NaN
    seen = lens[:, None] - S + 1 + torch.arange(S, device=table.device)  # [B, S]
    logits = torch.einsum("bshd,btd->bsht", q.to(real), latent) * scale
    logits = logits.masked_fill(token >= seen[:, :, None, None], float("-inf"))
    lse = torch.logsumexp(logits, -1)
    p = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    out = torch.einsum("bsht,btd->bshd", p, latent[..., :R])
    return out.to(q.dtype).contiguous(), lse.contiguous()
