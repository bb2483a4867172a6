"""Sampling on the CPU: each request does only the work that its options ask for, and sorts only what it must."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...ops.sampling import FACTORS, LARGEST_UNIFORM, noise_keys, sample, spec_verify, verify

SHORTLIST = 1024  # top-p looks at this many of the likeliest before it sorts a whole vocabulary
ROW_BY_ROW = 4096  # smaller vocabularies are filtered faster as one batch, sorts and all
BLOCK = 1 << 17  # logits at a time: memory that is fresh from the system costs more than the arithmetic in it
HALF, UNIT, ROOM = np.float32(0.5), np.float32(2.0**-31), np.float32(1 + 2.0**-20)


def _keys(seed: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.sampling.noise_keys` as i32 [B, 1]. It is made of operators alone, and numpy's cost a quarter of torch's."""
    arrays: Any = seed.numpy(), position.numpy()
    keys: Any = noise_keys(*arrays)
    first, second = (key.astype(np.uint32).view(np.int32)[:, None] for key in keys)
    return torch.from_numpy(first), torch.from_numpy(second)


def _mix(word: NDArray[np.uint32], spare: NDArray[np.uint32]) -> None:
    """The specification's mixer, in place: its products wrap as the specification's masks cut. By numpy, which has
    shifts without a sign and writes into memory that is there."""
    for shift, factor in zip((15, 12), FACTORS, strict=True):
        np.bitwise_xor(word, np.right_shift(word, shift, out=spare), out=word)
        np.multiply(word, factor, out=word)
    np.bitwise_xor(word, np.right_shift(word, 15, out=spare), out=word)


def _noise(first: Tensor, second: Tensor, tokens: Tensor) -> Tensor:
    """Keys i32 [B, 1] and token ids i32 [N] -> `ops.sampling.noise_bits` i32 [B, N]."""
    word = tokens ^ first
    words, spare = word.numpy().view(np.uint32), np.empty(word.shape, np.uint32)
    _mix(words, spare)
    word.add_(second)
    _mix(words, spare)
    np.right_shift(words, 1, out=words)
    return word


def _race(weights: Tensor, bits: Tensor) -> Tensor:
    """weights f32, bits i32 [B, N] -> i64 [B], a sample of each row: the first of the largest weight / e.

    e = -log(1 - u) is exponential noise of the uniform u = (bits + 1/2) / 2^31, and -log(e) is `ops.sampling.gumbel`.
    As e >= u, weight / u is a bound. The logarithm is taken of a row's largest only, until that is no bound any more.
    """
    scores = bits.float().add_(0.5)
    torch.div(weights, scores, out=scores)  # bounds at first, all of them 2^31 times smaller
    score, weight, bit = scores.numpy(), weights.numpy(), bits.numpy()
    chosen, rows = score.argmax(-1), np.arange(len(score))
    while len(rows):
        best = chosen[rows]
        uniform = np.minimum((bit[rows, best].astype(np.float32) + HALF) * UNIT, LARGEST_UNIFORM)
        # With room for rounding: a bound never comes out below what it bounds.
        score[rows, best] = weight[rows, best] / (np.log1p(-uniform) * (ROOM / -UNIT))
        chosen[rows] = (score if len(rows) == len(score) else score[rows]).argmax(-1)
        rows = rows[chosen[rows] != best]
    return torch.from_numpy(chosen)


def _argmax(x: Tensor) -> Tensor:
    """x [B, V] f32 -> i64 [B], of equal values the first: by numpy, in a twelfth of PyTorch's time."""
    return torch.from_numpy(x.numpy().argmax(-1))


def _exp(x: Tensor) -> Tensor:
    """By numpy, in half of PyTorch's time."""
    return torch.from_numpy(np.exp(x.numpy()))


def _likeliest(scaled: Tensor, k: int) -> Tensor:
    """Ascending indices of the k largest; of equal values the lowest indices."""
    threshold = scaled.topk(k).values[-1]
    above = scaled > threshold
    missing = k - int(above.sum())
    above[(scaled == threshold).nonzero()[:missing, 0]] = True
    return above.nonzero()[:, 0]


def _nucleus(scaled: Tensor, share: float) -> Tensor:
    """Indices of the smallest set of the likeliest that holds `share` of the probability; at least one."""
    count = scaled.shape[0]
    probability = scaled.softmax(0)
    if count > SHORTLIST:
        # Everything above the shortlist's smallest value is in it, ties included: enough, if that holds the share.
        floor = scaled.topk(SHORTLIST, sorted=False).values.amin()
        listed = (scaled > floor).nonzero()[:, 0]
        if probability[listed].sum() <= share:
            listed = torch.arange(count)
    else:
        listed = torch.arange(count)
    order = listed[scaled[listed].sort(descending=True, stable=True).indices]
    ranked = probability[order]
    kept = ranked.cumsum(0) - ranked < share
    kept[0] = True
    return order[kept]


def _draw(scaled: Tensor, top_k: int, top_p: float, min_p: float, first: Tensor, second: Tensor) -> int:
    """One sample of softmax(scaled), whose maximum is 0, after the filters."""
    tokens = None
    if min_p > 0:
        tokens = (scaled >= torch.tensor(min_p).log()).nonzero()[:, 0]
        scaled = scaled[tokens]
    if 0 < top_k < scaled.shape[0]:
        best = _likeliest(scaled, top_k)
        tokens, scaled = best if tokens is None else tokens[best], scaled[best]
    if top_p < 1:
        best = _nucleus(scaled, top_p).sort().values
        tokens, scaled = best if tokens is None else tokens[best], scaled[best]
    ids = torch.arange(scaled.shape[0], dtype=torch.int32) if tokens is None else tokens.int()
    chosen = int(_race(scaled.exp()[None], _noise(first[None], second[None], ids)))
    return chosen if tokens is None else int(tokens[chosen])


def _is_f32(logits: Tensor, *rest: Tensor) -> bool:
    return logits.dtype == torch.float32


@sample.kernel("cpu", "torch", supports=_is_f32)
def sample_torch(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    row_by_row = False
    keys = seed, position  # which nobody reads where every row takes its likeliest
    hot = temperature > 0
    if hot.any():
        row_by_row = bool(((top_k > 0) | (top_p < 1) | (min_p > 0)).logical_and_(hot).any())
        if row_by_row and logits.shape[1] < ROW_BY_ROW:
            return sample.spec(logits, temperature, top_k, top_p, min_p, seed, position)
        keys = _keys(seed, position)
    columns = (logits, temperature, top_k, top_p, min_p, *keys)
    if logits.numel() <= BLOCK:
        return _sample(row_by_row, *columns)
    blocks = zip(*(column.split(max(BLOCK // logits.shape[1], 1)) for column in columns), strict=True)
    tokens, logprobs = zip(*(_sample(row_by_row, *block) for block in blocks), strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _sample(
    row_by_row: bool,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    first: Tensor,
    second: Tensor,
) -> tuple[Tensor, Tensor]:
    """A block of rows of `sample`, with its keys; row_by_row: there are filters."""
    likeliest = _argmax(logits)
    centred = logits - logits.gather(-1, likeliest[:, None])
    token = likeliest
    hot, weights = temperature > 0, _exp(centred)
    if hot.any():
        plain = bool((temperature == 1).all())
        scaled = centred if plain else centred / torch.where(hot, temperature, 1.0)[:, None]
        if row_by_row:
            filters = zip(top_k.tolist(), top_p.tolist(), min_p.tolist(), strict=True)
            token = token.clone()
            for row, options in enumerate(filters):
                if hot[row]:
                    token[row] = _draw(scaled[row], *options, first[row], second[row])
        else:
            bits = _noise(first, second, torch.arange(logits.shape[1], dtype=torch.int32))
            token = torch.where(hot, _race(weights if plain else _exp(scaled), bits), token)
    # As `log_probability`, from what is here already.
    others = weights.scatter_(-1, likeliest[:, None], 0.0).sum(-1)
    return token, centred.gather(-1, token[:, None]).squeeze(-1) - others.log1p()


@spec_verify.kernel("cpu", "torch", supports=lambda draft, logits, *rest: _is_f32(logits))
def spec_verify_torch(draft: Tensor, logits: Tensor, *options: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return verify(sample_torch, draft, logits, *options)
