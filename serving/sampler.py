"""From logits to tokens, as each request wants it: biases, penalties and guides, then the `sample` op, then reports.

Drafted tokens are verified by sampling at every position with the noise of that position and comparing (sample and
match): so a text is the same with speculation and without.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..ops.sampling import log_probability, sample, spec_verify
from .messages import TopLogprobs
from .request import Masks, Request


class MaskApplier(Protocol):
    """guides.apply_mask: -inf into rows of logits [R, V] where the bits of masks say no."""

    def __call__(self, logits: Tensor, rows: Sequence[int], masks: Masks) -> None: ...


@dataclass
class Chosen:
    """Of B requests with up to K drafted tokens, on the device.

    tokens: i64 [B, K + 1], the accepted drafts and one more, then -1. logprobs: f32 [B, K + 1]. accepted: i32 [B].
    top: by request, of each of its positions, what is likeliest; only for those who asked.
    """

    tokens: Tensor
    logprobs: Tensor
    accepted: Tensor
    top: dict[int, list[TopLogprobs]]


def choose(
    raw: Tensor,
    requests: Sequence[Request],
    draft: Tensor,
    settings: Sequence[Tensor],
    positions: Tensor,
    apply_mask: MaskApplier,
) -> Chosen:
    """raw f32 [B, K + 1, V], the model's logits behind the last token and behind each drafted one (any number where
    there is none); draft i64 [B, K], -1 behind; settings as `sample` takes them, positions i64 [B]."""
    B, width = draft.shape[0], draft.shape[1] + 1
    special = [(i, request) for i, request in enumerate(requests) if request.special]
    logits = raw
    if any(request.changes_logits for _, request in special):
        logits = raw.clone()
        _change(logits, special, draft, apply_mask)
    if width == 1:
        token, logprob = sample(logits[:, 0], *settings, positions)
        tokens, logprobs = token[:, None], logprob[:, None]
        accepted = torch.zeros(B, dtype=torch.int32, device=raw.device)
    else:
        accepted, tokens, logprobs = spec_verify(draft, logits, *settings, positions)
    if logits is not raw or any(request.params.tempered_logprobs for _, request in special):
        logprobs = _reported(raw, requests, tokens)
    top = {
        i: top_logprobs(raw[i], request.params.top_logprobs) for i, request in special if request.params.top_logprobs
    }
    return Chosen(tokens, logprobs, accepted, top)


def _reported(raw: Tensor, requests: Sequence[Request], tokens: Tensor) -> Tensor:
    """Log-probabilities of the tokens under the model itself, at the temperature that each request wants."""
    heat = [r.params.temperature or 1.0 if r.params.tempered_logprobs else 1.0 for r in requests]
    divisor = torch.tensor(heat, device=raw.device).repeat_interleave(raw.shape[1])[:, None]
    rows = raw.flatten(0, 1)
    rows = rows if set(heat) == {1.0} else rows / divisor
    return log_probability(rows, tokens.flatten().clamp(min=0)).view(tokens.shape)


def top_logprobs(raw: Tensor, count: int) -> list[TopLogprobs]:
    """raw [S, V] -> for each of S positions the likeliest tokens."""
    best = torch.log_softmax(raw, -1).topk(min(count, raw.shape[-1]), -1)
    return [
        list(zip(ids, values, strict=True))
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _change(logits: Tensor, special: Sequence[tuple[int, Request]], draft: Tensor, apply_mask: MaskApplier) -> None:
    """Biases, penalties and guides, in place. logits [B, S, V]."""
    B, width, V = logits.shape
    masked: list[int] = []
    masks: list[Masks] = []
    for i, request in special:
        params = request.params
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            logits[i, :, ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
        if params.penalized:  # such requests draft nothing
            _penalize(logits[i, 0], request)
        if request.guide is not None:
            rows = np.full((len(request.draft) + 1, -(-V // 32)), -1, np.int32)
            request.guide.fill_along(request.draft, rows)
            masked += range(i * width, i * width + len(rows))
            masks.append(rows)
    if masked:
        apply_mask(logits.view(B * width, V), masked, np.concatenate(masks))


def _penalize(logits: Tensor, request: Request) -> None:
    """logits [V], in place: OpenAI's presence and frequency penalties of the generated tokens, then the repetition
    penalty of all tokens (CTRL, section 4.1)."""
    params = request.params
    generated = request.tokens[request.prompt_length :]
    if generated and (params.presence_penalty or params.frequency_penalty):
        ids, counts = np.unique(np.array(generated), return_counts=True)
        charge = params.presence_penalty + params.frequency_penalty * counts
        logits[torch.from_numpy(ids).to(logits.device)] -= torch.from_numpy(charge).to(logits.device, logits.dtype)
    if params.repetition_penalty != 1.0:
        places = torch.from_numpy(np.unique(np.array(request.tokens))).to(logits.device)
        values = logits[places]
        factor = params.repetition_penalty
        logits[places] = torch.where(values > 0, values / factor, values * factor)
