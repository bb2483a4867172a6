"""Decoding over the latent cache: a query's numbers depend on itself and on the tokens that it sees, on nothing else.

What a query sees is cut into pieces by the number of its tokens alone: whole pieces of WIDEST, then one that is filled
up to a power of two. Queries whose piece has the same place, width and pages are multiplied with it together, in tiles
(`tiles`): those of several heads, of several drafted tokens, of a chunk whose tokens pose as sequences, of sequences
that share a prefix. What a query does not see has weight 0, exactly, and the results of its pieces are merged in order.
"""

from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.mla_cache import mla_decode
from ..cpu.mla_cache import owned_rows, read_rows
from . import NAME
from .elementwise import exp, log, row_sum
from .products import matmul
from .tiles import in_tiles

NARROWEST, WIDEST = 64, 512  # tokens of a piece
LOGITS_AT_ONCE = 1 << 22


class Piece(NamedTuple):
    """Where a piece begins among a sequence's tokens, how wide it is, and the pages that hold its tokens, in order."""

    start: int
    width: int
    pages: tuple[int, ...]


def pieces(seen: int) -> list[tuple[int, int]]:
    """(start, width) of the pieces of a query that sees `seen` tokens, in order."""
    whole, rest = divmod(seen, WIDEST)
    cut = [(index * WIDEST, WIDEST) for index in range(whole)]
    if rest:
        cut.append((whole * WIDEST, max(NARROWEST, 1 << (rest - 1).bit_length())))
    return cut


@lru_cache(maxsize=1)  # all layers of a step ask the same
def shared_pieces(seen: tuple[int, ...], tables: tuple[tuple[int, ...], ...], page: int) -> dict[Piece, list[int]]:
    """Which queries meet which piece, by start. seen: tokens that each query sees; tables: its sequence's pages."""
    found: dict[Piece, list[int]] = {}
    for query, (count, table) in enumerate(zip(seen, tables, strict=True)):
        for start, width in pieces(count):
            end = min(start + width, count)
            pages = table[start // page : -(-end // page)]
            found.setdefault(Piece(start, width, pages), []).append(query)
    # Sorted, pages come right before what they are the beginning of: such pieces are one.
    joined: dict[Piece, list[int]] = {}
    last: Piece | None = None
    for piece in sorted(found, reverse=True):
        if last is None or piece[:2] != last[:2] or piece.pages != last.pages[: len(piece.pages)]:
            last = piece
        joined.setdefault(last, []).extend(found[piece])
    return dict(sorted(joined.items()))


class Meeting(NamedTuple):
    """Queries i64 [n] and the piece that they meet: keys [width, D], values [width, R], finite."""

    queries: Tensor
    keys: Tensor
    values: Tensor


class Attention:
    """What queries have seen so far: the running maximum and sum of their weights, and the weighted latents.

    q [N, H, D] and the rest in the dtype of the arithmetic; visible i64 [N]: how many tokens each query sees.
    """

    def __init__(self, q: Tensor, visible: Tensor, scale: float, rank: int):
        self.q, self.visible, self.scale = q, visible, scale
        N, H, _ = q.shape
        self.largest, self.sum = q.new_full((N, H, 1), float("-inf")), q.new_zeros(N, H, 1)
        self.out = q.new_zeros(N, H, rank)

    def meet(self, start: int, width: int, meetings: list[Meeting]) -> None:
        """Pieces of one place and width, and the queries of each: products piece by piece, the rest at once."""
        H, rank = self.out.shape[1:]
        queries = torch.cat([meeting.queries for meeting in meetings])
        tokens = torch.arange(start, start + width)
        rows = [self.q[meeting.queries].flatten(0, 1) for meeting in meetings]
        parts = [in_tiles(matmul, own, meeting.keys) for own, meeting in zip(rows, meetings, strict=True)]
        logits = torch.cat(parts).mul_(self.scale).view(-1, H, width)
        logits.masked_fill_((tokens >= self.visible[queries, None])[:, None], float("-inf"))
        largest = logits.amax(-1, keepdim=True)
        weights = exp(logits.sub_(largest))
        shares = weights.flatten(0, 1).split([len(own) for own in rows])
        parts = [in_tiles(matmul, own, meeting.values.T) for own, meeting in zip(shares, meetings, strict=True)]
        self._merge(queries, largest, row_sum(weights), torch.cat(parts).view(-1, H, rank))

    def _merge(self, queries: Tensor, largest: Tensor, total: Tensor, out: Tensor) -> None:
        before = self.largest[queries]
        joint = torch.maximum(before, largest)
        of_before, of_piece = exp(before - joint), exp(largest - joint)
        self.largest[queries] = joint
        self.sum[queries] = self.sum[queries] * of_before + total * of_piece
        self.out[queries] = self.out[queries] * of_before + out * of_piece

    def result(self) -> tuple[Tensor, Tensor]:
        """(weighted latents [N, H, R], log-sum-exp [N, H]); 0 and -inf for a query that has seen nothing."""
        nothing = self.sum == 0
        out = self.out / self.sum.masked_fill(nothing, 1.0)
        return out, (self.largest + log(self.sum)).squeeze(-1)


@mla_decode.kernel(NAME, "pieces", checked="hardware")
def mla_decode_pieces(
    q: Tensor,
    cache: list[Tensor],
    table: Tensor,
    lens: Tensor,
    lens_cpu: Tensor,
    plan: list[Tensor],
    scale: float,
    kv_lora_rank: int,
) -> tuple[Tensor, Tensor]:
    (B, S, H, D), real = q.shape, torch.promote_types(q.dtype, torch.float32)
    pages, page = cache[0], cache[0].shape[1]
    seen = tuple(max(length - S + s + 1, 0) for length in lens_cpu.tolist() for s in range(S))
    tables = tuple(owned for owned in map(tuple, table.tolist()) for _ in range(S))
    attention = Attention(q.to(real).reshape(B * S, H, D), torch.tensor(seen), scale, kv_lora_rank)
    for (start, width), found in groupby(shared_pieces(seen, tables, page).items(), key=lambda item: item[0][:2]):
        meetings, most = [], max(LOGITS_AT_ONCE // (H * width), 1)  # queries at once
        for piece, queries in found:
            latents = _latents(pages, piece, max(seen[query] for query in queries), kv_lora_rank, real)
            meetings += [Meeting(some, *latents) for some in torch.tensor(queries).split(most)]
        while meetings:
            count = 1
            while count < len(meetings) and sum(len(meeting.queries) for meeting in meetings[: count + 1]) <= most:
                count += 1
            attention.meet(start, width, meetings[:count])
            del meetings[:count]
    out, lse = attention.result()
    return out.view(B, S, H, kv_lora_rank).to(q.dtype), lse.view(B, S, H)


def _latents(pages: Tensor, piece: Piece, end: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys [width, D] and values [width, R] of a piece whose sequences hold tokens up to `end`; zeros behind them.

    Values are finite: one that is not has made the logits of those that see it NaN already, and must not reach others.
    """
    page = pages.shape[1]
    first = piece.start - piece.start // page * page
    rows = owned_rows(pages, list(piece.pages))[first : first + min(end - piece.start, piece.width)]
    latents = read_rows(rows, rank, dtype)
    keys = latents.new_zeros(piece.width, latents.shape[1])
    keys[: len(latents)] = latents
    return keys, keys[:, :rank].nan_to_num(0.0, 0.0, 0.0)
