"""Decoding over the latent cache: a query's numbers depend on itself and on the tokens that it sees, on nothing else.

What a query sees is cut into pieces by the number of its tokens alone: whole pieces of WIDEST, then one that is filled
up to a power of two. Queries whose piece has the same place, width and pages are multiplied with it together, in tiles
(`tiles`): those of several heads, of several drafted tokens, of a chunk whose tokens pose as sequences, of sequences
that share a prefix. What a query does not see has weight 0, exactly, and the results of its pieces are merged in order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.mla_cache import mla_decode
from ..cpu.mla_cache import owned_rows, read_rows
from . import NAME
from .elementwise import exp, log, row_sum
from .products import product

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


def shared_pieces(seen: list[int], tables: list[list[int]], page: int) -> dict[Piece, list[int]]:
    """Which queries meet which piece, by start. seen: tokens that each query sees; tables: its sequence's pages."""
    found: dict[Piece, list[int]] = {}
    for query, (count, table) in enumerate(zip(seen, tables, strict=True)):
        for start, width in pieces(count):
            end = min(start + width, count)
            pages = tuple(table[start // page : -(-end // page)])
            found.setdefault(Piece(start, width, pages), []).append(query)
    # Sorted, pages come right before what they are the beginning of: such pieces are one.
    joined: dict[Piece, list[int]] = {}
    last: Piece | None = None
    for piece in sorted(found, reverse=True):
        if last is None or piece[:2] != last[:2] or piece.pages != last.pages[: len(piece.pages)]:
            last = piece
        joined.setdefault(last, []).extend(found[piece])
    return dict(sorted(joined.items()))


class Attention:
    """What queries have seen so far: the running maximum and sum of their weights, and the weighted latents.

    q [N, H, D] and the rest in the dtype of the arithmetic.
    """

    def __init__(self, q: Tensor, scale: float, rank: int):
        self.q, self.scale = q, scale
        N, H, _ = q.shape
        self.largest, self.sum = q.new_full((N, H, 1), float("-inf")), q.new_zeros(N, H, 1)
        self.out = q.new_zeros(N, H, rank)

    def meet(self, queries: Tensor, unseen: Tensor, keys: Tensor, values: Tensor) -> None:
        """queries i64 [n]; unseen bool [n, width]; keys [width, D]; values [width, R], finite."""
        H, rank = self.out.shape[1:]
        logits = product(self.q[queries].flatten(0, 1), keys).mul_(self.scale).view(-1, H, len(keys))
        logits.masked_fill_(unseen[:, None], float("-inf"))
        largest = logits.amax(-1, keepdim=True)
        weights = exp(logits.sub_(largest))
        out = product(weights.flatten(0, 1), values.T).view(-1, H, rank)
        before = self.largest[queries]
        joint = torch.maximum(before, largest)
        of_before, of_piece = exp(before - joint), exp(largest - joint)
        self.largest[queries] = joint
        self.sum[queries] = self.sum[queries] * of_before + row_sum(weights) * of_piece
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
    seen = [max(length - S + s + 1, 0) for length in lens_cpu.tolist() for s in range(S)]
    tables = [owned for owned in table.tolist() for _ in range(S)]
    visible = torch.tensor(seen)
    attention = Attention(q.to(real).reshape(B * S, H, D), scale, kv_lora_rank)
    for piece, queries in shared_pieces(seen, tables, page).items():
        keys, values = _latents(pages, piece, max(seen[query] for query in queries), kv_lora_rank, real)
        tokens = torch.arange(piece.start, piece.start + piece.width)
        for some in torch.tensor(queries).split(max(LOGITS_AT_ONCE // (H * piece.width), 1)):
            attention.meet(some, tokens >= visible[some, None], keys, values)
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
