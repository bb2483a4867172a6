"""Sampling on the CPU: each request does only the work that its options ask for, and sorts only what it must."""

import torch
from torch import Tensor

from ...ops.sampling import FACTORS, LARGEST_UNIFORM, accept, each_position, noise_keys, sample, spec_verify

SHORTLIST = 1024  # top-p looks at this many of the likeliest before it sorts a whole vocabulary
ROW_BY_ROW = 4096  # smaller vocabularies are filtered faster as one batch, sorts and all
SIGN = 2**31


def _signed(word: Tensor) -> Tensor:
    """32-bit words (int64) as the int32 of the same bits."""
    return ((word ^ SIGN) - SIGN).int()


def _mix(word: Tensor) -> None:
    """The specification's mixer, in place on int32: its products wrap as the specification's masks cut."""
    word.bitwise_xor_((word >> 15).bitwise_and_(0x1FFFF)).mul_(FACTORS[0])
    word.bitwise_xor_((word >> 12).bitwise_and_(0xFFFFF)).mul_(FACTORS[1])
    word.bitwise_xor_((word >> 15).bitwise_and_(0x1FFFF))


def _exponential(first: Tensor, second: Tensor, tokens: Tensor) -> Tensor:
    """Exponential noise e f32 of keys and tokens, all i32, broadcast together: -log(e) is `ops.sampling.gumbel`, so the
    largest weight / e is the largest log-weight + gumbel, and spares a logarithm."""
    word = tokens ^ first
    _mix(word)
    word.add_(second)
    _mix(word)
    uniform = (word >> 1).bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=LARGEST_UNIFORM)
    return uniform.neg_().log1p_().neg_()


def _argmax(x: Tensor) -> Tensor:
    """x [B, V] f32 -> i64 [B], of equal values the first: by numpy, in a twelfth of PyTorch's time."""
    return torch.from_numpy(x.numpy().argmax(-1))


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
    chosen = int((scaled.exp() / _exponential(first, second, ids)).argmax())
    return chosen if tokens is None else int(tokens[chosen])


def _is_f32(logits: Tensor, *rest: Tensor) -> bool:
    return logits.dtype == torch.float32


@sample.kernel("cpu", "torch", supports=_is_f32)
def sample_torch(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    likeliest = _argmax(logits)
    centred = logits - logits.gather(-1, likeliest[:, None])
    token = likeliest
    hot, weights = temperature > 0, centred.exp()
    if hot.any():
        filtered = hot & ((top_k > 0) | (top_p < 1) | (min_p > 0))
        if filtered.any() and logits.shape[1] < ROW_BY_ROW:
            return sample.spec(logits, temperature, top_k, top_p, min_p, seed, position)
        plain = bool((temperature == 1).all())
        scaled = centred if plain else centred / torch.where(hot, temperature, 1.0)[:, None]
        first, second = (_signed(key)[:, None] for key in noise_keys(seed, position))
        if filtered.any():
            filters = zip(top_k.tolist(), top_p.tolist(), min_p.tolist(), strict=True)
            token = token.clone()
            for row, options in enumerate(filters):
                if hot[row]:
                    token[row] = _draw(scaled[row], *options, first[row], second[row])
        else:
            race = _exponential(first, second, torch.arange(logits.shape[1], dtype=torch.int32))
            token = torch.where(hot, _argmax(torch.div(weights if plain else scaled.exp_(), race, out=race)), token)
    # As `log_probability`, from what is here already.
    others = weights.scatter_(-1, likeliest[:, None], 0.0).sum(-1)
    return token, centred.gather(-1, token[:, None]).squeeze(-1) - others.log1p()


@spec_verify.kernel("cpu", "torch", supports=lambda draft, logits, *rest: _is_f32(logits))
def spec_verify_torch(
    draft: Tensor,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    options = each_position(draft, [temperature, top_k, top_p, min_p, seed], position)
    token, logprob = sample_torch(logits.flatten(0, 1), *options)
    shape = (draft.shape[0], draft.shape[1] + 1)
    return accept(draft, token.view(shape), logprob.view(shape))
