"""The clipped policy loss of GRPO and its relatives, from per-token numbers of packed sequences.

With r = pi / pi_old of a token (gspo: their geometric mean over its sequence), A the advantage of its sequence and w
the importance weight of the rollout's mismatch, a token contributes

    -w min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) + beta KL(pi, pi_ref)

and the contributions are averaged over the whole batch of an update, however it is cut into micro-batches and spread
over processes:

    grpo, gspo   over the tokens of a sequence, then over sequences    DeepSeekMath, eq. 3; GSPO, eq. 5
    dapo         over all tokens alike                                 DAPO, eq. 8
    dr_grpo      summed, over sequences x the longest completion       Understanding R1-Zero-like training, eq. 3

Names of metrics are those of TRL.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import CorrectionSection, LossSection
from .tally import Tally


@dataclass(frozen=True)
class Tokens:
    """The tokens of B sequences that the model wrote and learns from, T of them in all.

    sequence i64 [T]: which one each belongs to, 0 .. B - 1, in any order. logp f32 [T] of the policy, with gradient;
    entropy f32 [T] of its distribution; old_logp of the policy before the first update on this batch (None: this is
    that policy); reference_logp of the reference; sampling_logp as the rollout had it. advantages f32 [B].
    All log-probabilities are at the temperature of the rollout.
    """

    sequence: Tensor
    advantages: Tensor
    logp: Tensor
    entropy: Tensor
    old_logp: Tensor | None = None
    reference_logp: Tensor | None = None
    sampling_logp: Tensor | None = None

    def mean(self, values: Tensor) -> Tensor:
        """[T] -> [B], the mean over each sequence; 0 for one without tokens."""
        return self.sum(values) / self.lengths.clamp_min(1)

    def sum(self, values: Tensor) -> Tensor:
        """[T] -> [B]."""
        return values.new_zeros(len(self.advantages)).index_add(0, self.sequence, values)

    @property
    def lengths(self) -> Tensor:
        return torch.bincount(self.sequence, minlength=len(self.advantages))


@dataclass(frozen=True)
class BatchSize:
    """Of the whole batch of an update, over all processes: sequences (those count that have no tokens to learn from,
    too), tokens to learn from, and the most tokens that a completion may have.
    """

    sequences: int
    tokens: int
    max_tokens: int


def policy_loss(tokens: Tokens, size: BatchSize, settings: LossSection) -> tuple[Tensor, Tally]:
    """The share of these tokens in the loss of the batch, a scalar; shares add up. And what the log says about them."""
    logp = tokens.logp
    old = logp.detach() if tokens.old_logp is None else tokens.old_logp
    log_ratio = logp - old
    if settings.kind == "gspo":
        log_ratio = tokens.mean(log_ratio)[tokens.sequence]
    ratio, advantage = log_ratio.exp(), tokens.advantages[tokens.sequence]
    clipped = ratio.clamp(1 - settings.epsilon_low, 1 + settings.epsilon_high)
    bounded = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
    objective = torch.minimum(bounded * advantage, clipped * advantage)
    tally = Tally()
    correction = importance_weights(tokens, old, settings.is_correction, tally)
    loss = -objective if correction is None else -objective * correction
    if settings.beta:
        assert tokens.reference_logp is not None
        kl = kl_estimate(logp, tokens.reference_logp, settings.kl)
        kl = kl * ratio if settings.unbiased_kl else kl
        loss = loss + settings.beta * kl
        tally.mean("kl", kl.detach())
    total = (loss * _weights(tokens, size, settings.kind)).sum()
    if settings.entropy_coef:
        total = total - settings.entropy_coef * tokens.entropy.sum() / max(size.tokens, 1)
    tally.mean("entropy", tokens.entropy.detach())
    _tally_clipping(tokens, ratio.detach(), advantage, settings, tally)
    return total, tally


def kl_estimate(logp: Tensor, reference_logp: Tensor, kind: str) -> Tensor:
    """Estimate of KL(pi, pi_ref) from a token drawn from pi, for each token (Schulman, Approximating KL divergence).

    k1 is unbiased and has no gradient in expectation; k2 has the gradient of KL; k3 is unbiased and never negative, and
    what the papers of DeepSeek use.
    """
    difference = reference_logp - logp
    if kind == "k1":
        return -difference
    if kind == "k2":
        return difference.square() / 2
    return difference.exp() - difference - 1


def importance_weights(tokens: Tokens, old_logp: Tensor, settings: CorrectionSection, tally: Tally) -> Tensor | None:
    """pi_old / pi_rollout of each token [T], or of its whole sequence, bounded as the settings say; None for all ones.

    How far the two differ is told to `tally` wherever the rollout's log-probabilities are known.
    """
    if tokens.sampling_logp is None:
        return None
    difference = old_logp - tokens.sampling_logp
    tally.mean("sampling/sampling_logp_difference/mean", difference.abs())
    tally.most("sampling/sampling_logp_difference/max", difference.abs())
    if settings.level == "none":
        return None
    weights = (difference if settings.level == "token" else tokens.sum(difference)).exp()
    weights = weights.clamp(max=settings.cap) if settings.mode == "truncate" else weights * (weights <= settings.cap)
    told = weights if settings.level == "token" else weights[tokens.lengths > 0]
    tally.mean("sampling/importance_sampling_ratio/mean", told)
    tally.least("sampling/importance_sampling_ratio/min", told)
    tally.most("sampling/importance_sampling_ratio/max", told)
    return weights if settings.level == "token" else weights[tokens.sequence]


def _weights(tokens: Tokens, size: BatchSize, kind: str) -> Tensor | float:
    """What each token counts in the mean over the batch."""
    if kind == "dapo":
        return 1 / max(size.tokens, 1)
    if kind == "dr_grpo":
        return 1 / (size.sequences * size.max_tokens)
    return 1 / (tokens.lengths[tokens.sequence] * size.sequences)


def _tally_clipping(tokens: Tokens, ratio: Tensor, advantage: Tensor, settings: LossSection, tally: Tally) -> None:
    low = ((ratio < 1 - settings.epsilon_low) & (advantage < 0)).float()
    high = ((ratio > 1 + settings.epsilon_high) & (advantage > 0)).float()
    learning = tokens.lengths > 0
    for name, clipped in (("low", low), ("high", high), ("region", low + high)):
        per_sequence = tokens.mean(clipped)[learning]
        tally.mean(f"clip_ratio/{name}_mean", per_sequence if settings.kind == "gspo" else clipped)
        if name == "low":
            tally.least("clip_ratio/low_min", per_sequence)
        if name == "high":
            tally.most("clip_ratio/high_max", per_sequence)
