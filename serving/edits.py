"""What a request's options do to its logits, as tensors: see step.Edits."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .request import Masks, Request
from .step import Edits

Rows = list[NDArray[np.int64]]


def edits_of(requests: Sequence[Request], width: int, vocab_size: int) -> Edits | None:
    """None where nothing is changed.

    requests: those that sample, each with `width` rows of logits: its next token's, and one per drafted token.

    Biases and guides hold for all rows of a request; penalized requests draft nothing and have one. Presence and
    frequency penalties are OpenAI's, of the generated tokens; the repetition penalty is that of CTRL (section 4.1).
    """
    added: tuple[Rows, Rows, list[NDArray[np.float32]]] = ([], [], [])
    repeated: tuple[Rows, Rows, list[NDArray[np.float32]]] = ([], [], [])
    masked: list[int] = []
    masks: list[Masks] = []

    def put(where: tuple[Rows, Rows, list[NDArray[np.float32]]], row: int, tokens: object, values: object) -> None:
        ids = np.asarray(tokens, np.int64)
        where[0].append(np.full(len(ids), row, np.int64))
        where[1].append(ids)
        where[2].append(np.broadcast_to(np.asarray(values, np.float32), ids.shape))

    for i, request in enumerate(requests):
        if not request.changes_logits:
            continue
        params, first = request.params, i * width
        rows = range(first, first + len(request.draft) + 1)
        if params.logit_bias:
            for row in rows:
                put(added, row, list(params.logit_bias), list(params.logit_bias.values()))
        generated = request.tokens[request.prompt_length :]
        if generated and (params.presence_penalty or params.frequency_penalty):
            ids, counts = np.unique(np.array(generated), return_counts=True)
            put(added, first, ids, -(params.presence_penalty + params.frequency_penalty * counts))
        if params.repetition_penalty != 1.0:
            put(repeated, first, np.unique(np.array(request.tokens)), params.repetition_penalty)
        if request.guide is not None:
            mine = np.full((len(rows), -(-vocab_size // 32)), -1, np.int32)
            request.guide.fill_along(request.draft, mine)
            masked += rows
            masks.append(mine)
    if not (added[0] or repeated[0] or masked):
        return None
    edits = Edits()
    if added[0]:
        edits.bias_row, edits.bias_token, edits.bias = (torch.from_numpy(np.concatenate(part)) for part in added)
    if repeated[0]:
        edits.repeat_row, edits.repeat_token, edits.repeat = (
            torch.from_numpy(np.concatenate(part)) for part in repeated
        )
    if masked:
        edits.mask_row, edits.mask = torch.tensor(masked), torch.from_numpy(np.concatenate(masks))
    return edits
