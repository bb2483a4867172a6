"""Choosing tokens: sampling with stateless noise, and the verification of drafted tokens.

Randomness is a function of (seed, position, token) and of nothing else. So a request gives the same text alone or in a
batch, before or after a preemption, and on every backend; and a draft verified with the noise that plain decoding would
have used yields exactly the tokens of plain decoding.

Shapes: B requests, V vocabulary, K drafted tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .op import op

WORD = 0xFFFFFFFF
# Both factors are below 2**31: a 32-bit word times one of them fits a signed 64-bit integer, so no device overflows.
FACTORS = (0x2C1B3C6D, 0x297A2D39)
OPTIONS = ("temperature", "top_k", "top_p", "min_p", "seed", "position")  # of each request
LARGEST_UNIFORM = 1 - 2.0**-24  # the largest float32 below 1: the noise stays finite


def _mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words (in int64) that changes half of the bits when one changes: xorshift and multiply."""
    word = word ^ (word >> 15)
    word = (word * FACTORS[0]) & WORD
    word = word ^ (word >> 12)
    word = (word * FACTORS[1]) & WORD
    return word ^ (word >> 15)


def noise_keys(seed: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """seed, position i64 [B] -> two 32-bit words (int64) [B] that name the noise of one token of one request."""
    low, high, place = seed & WORD, (seed >> 32) & WORD, position & WORD
    first = _mix(_mix(_mix((low + 0x9E3779B9) & WORD) ^ high) ^ place)
    second = _mix((_mix(_mix((high + 0x7F4A7C15) & WORD) ^ low) + place) & WORD)
    return first, second


def noise_bits(first: Tensor, second: Tensor, token: Tensor) -> Tensor:
    """Keys and token ids i64, broadcast together -> 31 random bits i64 of each (request, position, token)."""
    return _mix((_mix(token ^ first) + second) & WORD) >> 1


def gumbel(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """31 random bits -> standard Gumbel noise of `dtype`: argmax(logits + noise) is a sample of softmax(logits).

    Through log1p of a uniform near 0, where floats are dense: that end decides which token wins.
    """
    uniform = ((bits.to(dtype) + 0.5) * 2.0**-31).clamp(max=LARGEST_UNIFORM)
    return -torch.log(-torch.log1p(-uniform))


def _kept(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """scaled [B, V], log-weights with maximum 0 -> bool [B, V]: the tokens that the filters leave."""
    ranked, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[-1], device=scaled.device)
    kept = ranked >= min_p.log()[:, None]
    kept = kept & ((top_k <= 0)[:, None] | (rank < top_k[:, None]))
    share = ranked.masked_fill(~kept, float("-inf")).softmax(-1)
    before = share.cumsum(-1) - share
    # 1 means off: the rounded sum may reach 1 before the last token. The first token always stays.
    kept = kept & ((before < top_p[:, None]) | (top_p >= 1)[:, None] | (rank == 0))
    return torch.zeros_like(kept).scatter(-1, order, kept)


def log_probability(logits: Tensor, token: Tensor) -> Tensor:
    """logits [B, V], token i64 [B] -> log softmax(logits)[token] [B], with full relative precision near probability 1,
    where the difference of a logit and a log-sum-exp has none left."""
    largest, likeliest = logits.max(-1, keepdim=True)
    others = (logits - largest).exp().scatter(-1, likeliest, 0.0).sum(-1)
    return (logits.gather(-1, token[:, None]) - largest).squeeze(-1) - others.log1p()


@op(
    shapes={"logits": "B V", **dict.fromkeys(OPTIONS, "B")},
    tolerance=(0.0, 1e-5),
    cost=lambda logits, *rest: (40 * logits.numel(), logits.nbytes),
)
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sample one token per request.

    logits f32 [B, V], -inf where a token is forbidden (at least one must not be); temperature f32 [B], 0 takes the
    largest logit, ties to the lowest id; then, in this order: min_p f32 [B] in [0, 1] keeps tokens with at least this
    share of the likeliest one's probability (0: off); top_k i32 [B] keeps the k likeliest, ties to the lowest id (0:
    off); top_p f32 [B] keeps the smallest set of the likeliest that holds this much of what is left (1: off). seed i64
    [B]; position i64 [B], the place of the new token in its sequence (its low 32 bits count).
    -> token i64 [B] = argmax(logit / temperature + gumbel(seed, position, token)) over the kept;
       logprob f32 [B] of it in the unfiltered distribution at temperature 1.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    divisor = torch.where(temperature > 0, temperature, torch.ones_like(temperature))
    scaled = (logits - logits.amax(-1, keepdim=True)) / divisor[:, None]
    first, second = noise_keys(seed, position)
    bits = noise_bits(first[:, None], second[:, None], torch.arange(logits.shape[-1], device=logits.device))
    noisy = scaled + gumbel(bits, scaled.dtype)
    drawn = noisy.masked_fill(~_kept(scaled, top_k, top_p, min_p), float("-inf")).argmax(-1)
    token = torch.where(temperature > 0, drawn, logits.argmax(-1))
    return token, log_probability(logits, token)


def each_position(draft: Tensor, options: list[Tensor], position: Tensor) -> list[Tensor]:
    """Arguments of K + 1 `sample`s per request: options [B] repeated, positions counted up, each [B * (K + 1)]."""
    count = draft.shape[1] + 1
    positions = position[:, None] + torch.arange(count, device=position.device)
    return [*(option.repeat_interleave(count) for option in options), positions.reshape(-1)]


def verify(
    choose: Callable[..., tuple[Tensor, Tensor]], draft: Tensor, logits: Tensor, *options: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `spec_verify` returns, where `choose` is `sample` of K + 1 rows per request, as if the draft were right."""
    *settings, position = options
    token, logprob = choose(logits.flatten(0, 1), *each_position(draft, settings, position))
    token, logprob = (values.view(draft.shape[0], draft.shape[1] + 1) for values in (token, logprob))
    accepted = (draft == token[:, :-1]).int().cumprod(1).sum(1)
    valid = torch.arange(token.shape[1], device=token.device) <= accepted[:, None]
    return accepted.int(), token.masked_fill(~valid, -1), logprob.masked_fill(~valid, 0.0)


def _verify_cost(draft: Tensor, logits: Tensor, *rest: Any) -> tuple[int, int]:
    return 40 * logits.numel(), logits.nbytes


@op(
    shapes={"draft": "B K", "logits": "B K+1 V", **dict.fromkeys(OPTIONS, "B")},
    tolerance=(0.0, 0.0, 1e-5),
    cost=_verify_cost,
)
def spec_verify(
    draft: Tensor,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accept the drafted tokens that plain decoding would have sampled, and sample one more.

    draft i64 [B, K], -1 where a request drafted fewer; logits f32 [B, K + 1, V], row i computed after draft[:, :i];
    position i64 [B]: the place of the first drafted token; the other options as in `sample`.
    -> accepted i32 [B]: how many leading drafts equal the target's sample; tokens i64 [B, K + 1]: these and the one
       after them, then -1; logprob f32 [B, K + 1] as in `sample`, then 0.

    Sample and match: the target is sampled at each position with the noise of that position. No token's distribution
    changes, nor any token, whatever the draft (a draft made with the same noise is accepted about as often as rejection
    sampling would).
    """
    return verify(sample.spec, draft, logits, temperature, top_k, top_p, min_p, seed, position)
