"""The latent cache: kv_lora_rank + qk_rope_head_dim values per token and layer, nothing else.

Two forms of one protocol. `PagedCache` is written in place, in pages that sequences may share; generation and serving
use it. `ContiguousCache` is functional (past in, present out), which is what export needs. How a page is laid out is
the backend's affair (`CacheLayout`): only the ops look inside.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UserError
from ..ops.cache_layout import CacheLayout, cache_layout
from ..ops.mla_cache import mla_cache_gather, mla_cache_write, mla_decode, mla_decode_plan
from .config import ModelConfig


class CacheStep(Protocol):
    """The cache as one forward pass sees it: bound to the sequences of the pass and the places of their new tokens.

    parts: None where all sequences attend in the same form; else the runs of sequences that do (see MixedStep).
    """

    absorbed: bool
    parts: "list[Part] | None"
    batch: int
    longest: int  # tokens of the longest sequence, the new ones included

    def append(self, layer: int, latent: Tensor) -> None:
        """Store the latents [T, R+r] of the new tokens of one layer."""

    def decode(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """Absorbed attention of q [T, H, R+r] over everything stored -> [T, H, R]."""

    def gather(self, layer: int) -> tuple[Tensor, Tensor, int]:
        """Everything stored, packed: latents [total, R+r], cu_seqlens i32 [B+1], the longest length."""


class PagedCache:
    """Pages of latents for every layer. Which sequence owns which page is the caller's affair (see PagedStep)."""

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        layout: CacheLayout | None = None,
    ):
        self.config, self.num_pages = config, num_pages
        self.layout = layout or cache_layout(config, dtype)
        self.layers: list[list[Tensor]] = [
            [torch.zeros((num_pages, *shape), dtype=dtype, device=device) for shape, dtype in self.layout.tensors]
            for _ in range(config.num_layers_with_mtp)
        ]

    @property
    def page_size(self) -> int:
        return self.layout.page_size

    @property
    def device(self) -> torch.device:
        return self.layers[0][0].device

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def rearrange(self, num_pages: int, moves: dict[int, int]) -> None:
        """Become `num_pages` pages, where page moves[old] holds what page `old` held; the others are empty.

        Layer by layer: the most memory that it takes at a time is the cache and one new layer.
        """
        device = self.device
        old = torch.tensor(list(moves), dtype=torch.int64, device=device)
        new = torch.tensor(list(moves.values()), dtype=torch.int64, device=device)
        for layer in self.layers:
            for i, pages in enumerate(layer):
                layer[i] = pages.new_zeros((num_pages, *pages.shape[1:])).index_copy_(0, new, pages[old])
        self.num_pages = num_pages

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Have page targets[i] hold what page sources[i] holds, in every layer."""
        source, target = (torch.tensor(pages, dtype=torch.int64, device=self.device) for pages in (sources, targets))
        for layer in self.layers:
            for pages in layer:
                pages.index_copy_(0, target, pages[source])

    def step(
        self, pages: list[list[int]], known: list[int], new: list[int], absorbed: bool | None = None
    ) -> "PagedStep":
        """Bind a forward pass.

        pages: for each sequence the pages it owns, in order; they must hold known + new tokens.
        known: tokens of each sequence that are already stored; new: tokens that this pass brings.
        absorbed: attend in latent space (decoding) or expand keys and values first (prefill). By default, latent space
            when every sequence brings the same few tokens.
        """
        size, lens = self.page_size, [old + fresh for old, fresh in zip(known, new, strict=True)]
        for owned, length in zip(pages, lens, strict=True):
            if len(owned) * size < length:
                raise UserError(f"cache: {length} tokens do not fit in {len(owned)} pages of {size}")
        uniform = len(set(new)) == 1
        if absorbed is None:
            absorbed = uniform and new[0] <= 4
        if absorbed and not uniform:
            raise UserError("cache: absorbed attention needs the same number of new tokens in every sequence")
        width = max(self.pages_for(length) for length in lens)
        table = [owned[:width] + [0] * (width - len(owned)) for owned in pages]
        slots = [
            owned[place // size] * size + place % size
            for owned, old, length in zip(pages, known, lens, strict=True)
            for place in range(old, length)
        ]
        return PagedStep(
            self,
            slots=torch.tensor(slots, dtype=torch.int64, device=self.device),
            table=torch.tensor(table, dtype=torch.int32, device=self.device),
            lens=torch.tensor(lens, dtype=torch.int32, device=self.device),
            lens_cpu=torch.tensor(lens, dtype=torch.int32),
            total=sum(lens),
            longest=max(lens),
            absorbed=absorbed,
        )


class PagedStep:
    """See CacheStep. Made of tensors, so that a decoding step that is captured can be replayed with others.

    slots: i64 [T], where the new tokens go: page * page size + offset. table: i32 [B, W], the pages of each sequence.
    lens: i32 [B], tokens of each sequence, the new ones included; lens_cpu: the same on the host.
    total, longest: sum and maximum of lens; upper bounds will do where absorbed.
    """

    parts: "list[Part] | None" = None

    def __init__(
        self,
        cache: PagedCache,
        slots: Tensor,
        table: Tensor,
        lens: Tensor,
        lens_cpu: Tensor,
        total: int,
        longest: int,
        absorbed: bool,
    ):
        self.cache, self.slots, self.table, self.lens, self.lens_cpu = cache, slots, table, lens, lens_cpu
        self.total, self.longest, self.absorbed, self.batch = total, longest, absorbed, len(lens)
        heads = cache.config.num_attention_heads
        self.plan: list[Tensor] = list(mla_decode_plan(lens, heads, cache.page_size)) if absorbed else []

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """i32 [B+1]: where each sequence's tokens begin in what `gather` returns."""
        return torch.nn.functional.pad(self.lens.cumsum(0, dtype=torch.int32), (1, 0))

    def append(self, layer: int, latent: Tensor) -> None:
        mla_cache_write(self.cache.layers[layer], self.slots, latent)

    def decode(self, layer: int, q: Tensor, scale: float) -> Tensor:
        q = q.view(self.batch, -1, *q.shape[1:])  # [B, S, H, R+r]
        rank = self.cache.config.kv_lora_rank
        out, _ = mla_decode(q, self.cache.layers[layer], self.table, self.lens, self.lens_cpu, self.plan, scale, rank)
        return out.flatten(0, 1)

    def gather(self, layer: int) -> tuple[Tensor, Tensor, int]:
        rank = self.cache.config.kv_lora_rank
        latents = mla_cache_gather(self.cache.layers[layer], self.table, self.lens, self.cu_seqlens, self.total, rank)
        return latents, self.cu_seqlens, self.longest


@dataclass(frozen=True)
class Part:
    """Neighbouring sequences of a pass that attend in one form.

    rows: their new tokens; cu_seqlens i32 [B+1], max_len: of these.
    """

    rows: slice
    cache: PagedStep
    cu_seqlens: Tensor
    max_len: int


class MixedStep:
    """Sequences that decode and others that prefill, in one pass: products see the tokens of all, attention part by
    part. slots: i64 [T], where all new tokens go."""

    absorbed = False

    def __init__(self, cache: PagedCache, slots: Tensor, parts: list[Part]):
        self.cache, self.slots = cache, slots
        self.parts: list[Part] | None = parts
        self.batch = sum(part.cache.batch for part in parts)
        self.longest = max(part.cache.longest for part in parts)

    def append(self, layer: int, latent: Tensor) -> None:
        mla_cache_write(self.cache.layers[layer], self.slots, latent)

    def decode(self, layer: int, q: Tensor, scale: float) -> Tensor:
        raise RuntimeError("the parts of a mixed step attend each for itself")

    def gather(self, layer: int) -> tuple[Tensor, Tensor, int]:
        raise RuntimeError("the parts of a mixed step attend each for itself")


class ContiguousCache:
    """The functional form: `past` [L, B, P, R+r] goes in, `present` [L, B, P+S, R+r] comes out; nothing is overwritten.

    Every sequence has P stored tokens and brings S new ones; attention is in latent space always.
    """

    absorbed = True
    parts: list[Part] | None = None

    def __init__(self, config: ModelConfig, past: Tensor):
        self.config, self.past, self.batch = config, past, past.shape[1]
        self.longest = config.max_position_embeddings
        self._present: list[Tensor | None] = [None] * past.shape[0]

    @property
    def present(self) -> Tensor:
        """[L, B, P+S, R+r]; layers that the pass did not visit must not exist."""
        return torch.stack([layer for layer in self._present if layer is not None])

    def append(self, layer: int, latent: Tensor) -> None:
        fresh = latent.view(self.batch, -1, latent.shape[-1])
        self._present[layer] = torch.cat([self.past[layer], fresh.to(self.past.dtype)], 1)

    def decode(self, layer: int, q: Tensor, scale: float) -> Tensor:
        pages = self._present[layer]  # a page per sequence: [B, P+S, R+r]
        if pages is None:
            raise RuntimeError(f"layer {layer} attends before it has stored its tokens")
        q = q.view(self.batch, -1, *q.shape[1:])
        table = torch.arange(self.batch, dtype=torch.int32, device=q.device)[:, None]
        lens = torch.full((self.batch,), pages.shape[1], dtype=torch.int32, device=q.device)
        lens_cpu = torch.full((self.batch,), pages.shape[1], dtype=torch.int32)
        plan = list(mla_decode_plan(lens, self.config.num_attention_heads, pages.shape[1]))
        out, _ = mla_decode(q, [pages], table, lens, lens_cpu, plan, scale, self.config.kv_lora_rank)
        return out.flatten(0, 1)

    def gather(self, layer: int) -> tuple[Tensor, Tensor, int]:
        pages = self._present[layer]
        if pages is None:
            raise RuntimeError(f"layer {layer} gathers before it has stored its tokens")
        length = pages.shape[1]
        cu_seqlens = torch.arange(self.batch + 1, dtype=torch.int32, device=pages.device) * length
        return pages.flatten(0, 1), cu_seqlens, length
