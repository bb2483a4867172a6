"""From logits to tokens: edits, then the `sample` op, then reports. On tensors only, on the device.

Drafted tokens are verified by sampling at every position with the noise of that position and comparing (sample and
match): so a text is the same with speculation and without.
"""

import torch
from torch import Tensor

from ..ops.sampling import log_probability, sample, spec_verify
from .step import Edits, StepInput


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
        forbid(logits, edits.mask_row.to(device), edits.mask.to(device))
    return logits


def forbid(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """-inf, in place, where a mask does not let a token through. logits [R, V]; rows i64 [G], each at most once; masks
    i32 [G, ceil(V / 32)], the lowest bit first."""
    octets = masks.contiguous().view(torch.uint8)  # [G, 4 ceil(V / 32)]
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    forbidden = ((octets[:, :, None] >> shifts) & 1).flatten(1)[:, : logits.shape[1]] == 0
    logits[rows] = logits[rows].masked_fill_(forbidden, float("-inf"))


def choose(
    raw: Tensor, step: StepInput, settings: list[Tensor], positions: Tensor, row_by_row: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """raw f32 [B (K + 1), V], the model's logits behind the last token and behind each drafted one (any numbers where
    there is none) -> tokens i64 [B, K + 1], the accepted drafts and one more, then -1; their logprobs f32; accepted
    i32 [B], None where K is 0. row_by_row: reports must not depend on the batch, to the last bit."""
    (B, width), edits = step.sampled.shape, step.edits
    logits = raw if edits is None else edited(raw, edits)
    accepted = None
    if width == 1:
        token, logprob = sample(logits, *settings, positions)
        tokens, logprobs = token.unsqueeze(1), logprob.unsqueeze(1)
    else:
        draft = step.draft.to(raw.device, non_blocking=True)
        accepted, tokens, logprobs = spec_verify(draft, logits.view(B, width, -1), *settings, positions)
    if edits is not None or len(step.heat):
        heat = step.heat if len(step.heat) else torch.ones(B)
        special = heat != 1
        if edits is not None:
            for rows in (edits.bias_row, edits.repeat_row, edits.mask_row):
                special[rows // width] = True  # what was reported is of the edited logits
        chosen, raw = special.nonzero()[:, 0].to(raw.device), raw.view(B, width, -1)
        logprobs = logprobs.index_copy(0, chosen, _reported(raw, tokens, heat.to(raw.device), chosen, row_by_row))
    return tokens, logprobs, accepted


def _reported(raw: Tensor, tokens: Tensor, heat: Tensor, chosen: Tensor, row_by_row: bool) -> Tensor:
    """raw f32 [B, K + 1, V] -> log-probabilities f32 [N, K + 1] of the tokens of the requests `chosen` i64 [N] under
    the model itself."""
    rows = (raw[chosen] / heat[chosen, None, None]).flatten(0, 1)
    named = tokens[chosen].clamp(min=0).flatten()
    if row_by_row:
        values = torch.cat([log_probability(rows[i : i + 1], named[i : i + 1]) for i in range(len(rows))])
    else:
        values = log_probability(rows, named)
    return values.view(len(chosen), tokens.shape[1])


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """logits f32 [..., V] -> ids i64 and log-probabilities f32 [..., count] of the likeliest, in order."""
    best = torch.log_softmax(logits, -1).topk(min(count, logits.shape[-1]), -1)
    return best.indices, best.values
