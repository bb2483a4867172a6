"""Sampling in two launches. The first goes over the logits once, a block of the vocabulary a program, the same blocks
whatever the batch (a request must give the same token alone and in any); the second puts a row's blocks together, and
filters the rows that want it. Rows without filters do not wait for any filter's pass, nor greedy ones for noise.

The noise is computed alike on every chip; the sums behind top-p and the log-probability are not, in their last digits.
"""

import torch
import triton.language as tl
from torch import Tensor

from ...ops.sampling import sample, spec_verify
from .noise import gumbel, log_of_one_plus, noise_keys
from .operands import by_rows, is_real
from .runtime import device_function, gpu_kernel, kernel, launch, power_of_two
from .sampling_filters import MOST_BLOCKS, SMALLEST, draw, find_cut
from .tables import tile

LARGEST_VOCABULARY = MOST_BLOCKS * 1024  # no table has smaller blocks


@device_function
def filters_of(request, temperature, top_k, top_p, min_p, V):
    """-> temperature, top_k, top_p, min_p of a request, and whether any of the three does anything."""
    heat, k = tl.load(temperature + request), tl.load(top_k + request).to(tl.int32)
    share, least = tl.load(top_p + request), tl.load(min_p + request)
    filtered = (heat > 0) & (((k > 0) & (k < V)) | (share < 1) | (least > 0))
    return heat, k, share, least, filtered


@device_function
def reciprocal(heat):
    """1 / temperature, finite: times it, the difference of equal logits is 0 and not NaN."""
    return tl.div_rn(1.0, tl.maximum(heat, SMALLEST))


@kernel
def survey_kernel(
    logits, temperature, top_k, top_p, min_p, seed, position, sums, places, V, row_stride, steps, BLOCK: tl.constexpr
):
    """A block of a row -> sums f32 [rows, 3, blocks]: its largest logit, the sum of exp(x - largest) of the others, the
    largest noisy logit less the first; places i32 [rows, 2, blocks]: where the largest and the largest noisy one are.

    Rows are requests times steps; the options are those of the request, and positions count up.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(1)
    request = row // steps
    heat, _, _, _, filtered = filters_of(request, temperature, top_k, top_p, min_p, V)
    place = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * row_stride + place, mask=place < V, other=float("-inf")).to(tl.float32)
    largest, at = tl.max(x, 0, return_indices=True)
    likeliest = block * BLOCK + at
    distance = x - tl.where(largest == float("-inf"), 0.0, largest)  # a block may be forbidden as a whole
    others = tl.sum(tl.where(place == likeliest, 0.0, tl.exp(distance)), 0)
    best = float("-inf")
    chosen = likeliest
    if (heat > 0) & (not filtered):
        first, second = noise_keys(tl.load(seed + request), tl.load(position + request) + row % steps)
        noisy = tl.fma(distance, reciprocal(heat).broadcast_to(x.shape), gumbel(first, second, place))
        best, at = tl.max(noisy, 0, return_indices=True)
        chosen = block * BLOCK + at
    here = row.to(tl.int64) * blocks
    tl.store(sums + here * 3 + block, largest)
    tl.store(sums + here * 3 + blocks + block, others)
    tl.store(sums + here * 3 + 2 * blocks + block, best)
    tl.store(places + here * 2 + block, likeliest)
    tl.store(places + here * 2 + blocks + block, chosen)


@kernel
def choose_kernel(
    logits, temperature, top_k, top_p, min_p, seed, position, sums, places, scratch, listed, token, logprob, V,
    row_stride, steps, blocks,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """What `survey_kernel` found in the blocks of a row -> token i64 [rows], logprob f32 [rows]; scratch [rows,
    FEW] of the logits' dtype and listed i32 [rows, 2 * BLOCK] are the filters'."""
    row = tl.program_id(0).to(tl.int64)
    request = row // steps
    here = logits + row * row_stride
    heat, k, share, least, filtered = filters_of(request, temperature, top_k, top_p, min_p, V)
    inverse = reciprocal(heat)

    block = tl.arange(0, BLOCKS)
    there = block < blocks
    largest = tl.load(sums + row * blocks * 3 + block, mask=there, other=float("-inf"))
    top, winner = tl.max(largest, 0, return_indices=True)
    likeliest = tl.load(places + row * blocks * 2 + winner)
    others = tl.load(sums + row * blocks * 3 + blocks + block, mask=there, other=0.0)
    others = tl.where(block == winner, others, (others + 1.0) * tl.exp(largest - top))
    chosen = likeliest
    if heat > 0:
        if filtered:
            cut, ties = find_cut(here, V, scratch + row * FEW, top, heat, inverse, k, share, least, BLOCK, STAGES, FEW)
            first, second = noise_keys(tl.load(seed + request), tl.load(position + request) + row % steps)
            chosen = draw(here, V, listed + row * 2 * BLOCK, cut, ties, top, inverse, first, second, BLOCK, STAGES)
        else:
            best = tl.load(sums + row * blocks * 3 + 2 * blocks + block, mask=there, other=float("-inf"))
            noisy = tl.fma(largest - top, inverse.broadcast_to(largest.shape), best)
            _, winner = tl.max(noisy, 0, return_indices=True)
            chosen = tl.load(places + row * blocks * 2 + blocks + tl.minimum(winner, blocks - 1))
    chosen = tl.minimum(chosen, V - 1)  # among NaN, the largest may be anywhere: nothing outside is read
    tl.store(token + row, chosen.to(tl.int64))
    x = tl.load(here + chosen).to(tl.float32)
    tl.store(logprob + row, (x - top) - log_of_one_plus(tl.sum(others, 0)))


@kernel
def accept_kernel(draft, sampled, logprobs, accepted, tokens, kept_logprobs, K, WIDTH: tl.constexpr):
    """draft [B, K], sampled and logprobs [B, K + 1] -> accepted i32 [B], tokens and kept_logprobs [B, K + 1]: see
    `ops.sampling.accept`; a program a request."""
    row = tl.program_id(0).to(tl.int64)
    step = tl.arange(0, WIDTH)
    there = step <= K
    place = row * (K + 1) + step
    target = tl.load(sampled + place, mask=there, other=-1)
    drafted = tl.load(draft + row * K + step, mask=step < K, other=-1)
    right = tl.min(tl.where((step < K) & (drafted != target), step, K), 0)
    tl.store(accepted + row, right)
    valid = step <= right
    tl.store(tokens + place, tl.where(valid, target, -1), mask=there)
    value = tl.load(logprobs + place, mask=there, other=0.0)
    tl.store(kept_logprobs + place, tl.where(valid, value, 0.0), mask=there)


# Launchers -----------------------------------------------------------------------------------------------------------


def _sample(logits: Tensor, options: tuple[Tensor, ...], steps: int) -> tuple[Tensor, Tensor]:
    """Rows of `steps` tokens per request, logits [requests * steps, V]."""
    rows, V = logits.shape
    logits = by_rows(logits)
    options = tuple(option.contiguous() for option in options)
    survey, choose = tile("survey", V=V), tile("choose", V=V)
    blocks = -(-V // survey["BLOCK"])
    sums = logits.new_empty(rows, 3, blocks, dtype=torch.float32)
    places = logits.new_empty(rows, 2, blocks, dtype=torch.int32)
    scratch = logits.new_empty(rows, choose["FEW"])
    listed = logits.new_empty(rows, 2 * choose["BLOCK"], dtype=torch.int32)
    token = logits.new_empty(rows, dtype=torch.int64)
    logprob = logits.new_empty(rows, dtype=torch.float32)
    launch(survey_kernel, (rows, blocks), logits, *options, sums, places, V, logits.stride(0), steps, **survey)
    launch(
        choose_kernel, (rows,), logits, *options, sums, places, scratch, listed, token, logprob, V, logits.stride(0),
        steps, blocks, BLOCKS=power_of_two(blocks), **choose,
    )  # fmt: skip
    return token, logprob


def _is_choice(logits: Tensor, *rest: Tensor) -> bool:
    return is_real(logits) and 1 < logits.shape[-1] <= LARGEST_VOCABULARY


@gpu_kernel(sample, _is_choice)
def sample_triton(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    return _sample(logits, (temperature, top_k, top_p, min_p, seed, position), 1)


@gpu_kernel(spec_verify, lambda draft, logits, *rest: _is_choice(logits))
def spec_verify_triton(
    draft: Tensor,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    B, K = draft.shape
    options = temperature, top_k, top_p, min_p, seed, position
    sampled, logprobs = _sample(logits.flatten(0, 1), options, K + 1)
    accepted = draft.new_empty(B, dtype=torch.int32)
    tokens, kept = sampled.new_empty(B, K + 1), logprobs.new_empty(B, K + 1)
    launch(
        accept_kernel, (B,), draft.contiguous(), sampled, logprobs, accepted, tokens, kept, K,
        WIDTH=power_of_two(K + 1), **tile("accept"),
    )  # fmt: skip
    return accepted, tokens, kept
