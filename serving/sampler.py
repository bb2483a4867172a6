"""From logits to tokens: edits, then the `sample` op, then reports. On tensors only, on the device.

Drafted tokens are verified by sampling at every position with the noise of that position and comparing (sample and
match): so a text is the same with speculation and without.
"""

import torch
from torch import Tensor

from ..ops.sampling import log_probability, sample, spec_verify
from .step import Edits, StepInput

BITS = 32


def edited(logits: Tensor, edits: Edits) -> Tensor:
    """A copy of logits f32 [R, V] with the edits made."""
    logits, device = logits.clone(), logits.device
    if len(edits.bias_row):
        places = (edits.bias_row.to(device), edits.bias_token.to(device))
        logits.index_put_(places, edits.bias.to(device), accumulate=True)
    if len(edits.repeat_row):
        places = (edits.repeat_row.to(device), edits.repeat_token.to(device))
        values, factor = logits[places], edits.repeat.to(device)
        logits[places] = torch.where(values > 0, values / factor, values * factor)
    if len(edits.mask_row):
        bits = torch.arange(BITS, dtype=torch.int32, device=device)
        allowed = (edits.mask.to(device)[:, :, None] >> bits & 1).bool().flatten(1)[:, : logits.shape[1]]
        rows = edits.mask_row.to(device)
        logits[rows] = logits[rows].masked_fill(~allowed, float("-inf"))
    return logits


def choose(raw: Tensor, step: StepInput, settings: list[Tensor], positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """raw f32 [B, K + 1, V], the model's logits behind the last token and behind each drafted one (any numbers where
    there is none) -> tokens i64 [B, K + 1], the accepted drafts and one more, then -1; their logprobs f32; accepted
    i32 [B]."""
    (B, width, V), edits = raw.shape, step.edits
    logits = edited(raw.view(B * width, V), edits).view(B, width, V) if edits.any else raw
    if width == 1:
        token, logprob = sample(logits[:, 0], *settings, positions)
        tokens, logprobs = token[:, None], logprob[:, None]
        accepted = torch.zeros(B, dtype=torch.int32, device=raw.device)
    else:
        draft = step.draft.to(raw.device, non_blocking=True)
        accepted, tokens, logprobs = spec_verify(draft, logits, *settings, positions)
    tempered = bool((step.heat != 1).any())
    if edits.any or tempered:
        rows = raw.flatten(0, 1)
        if tempered:
            rows = rows / step.heat.to(raw.device).repeat_interleave(width)[:, None]
        logprobs = log_probability(rows, tokens.flatten().clamp(min=0)).view(tokens.shape)
    return tokens, logprobs, accepted


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """logits f32 [..., V] -> ids i64 and log-probabilities f32 [..., count] of the likeliest, in order."""
    best = torch.log_softmax(logits, -1).topk(min(count, logits.shape[-1]), -1)
    return best.indices, best.values
