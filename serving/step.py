"""A step as tensors: all that a process needs to compute it, and all that comes of it. Nothing in it knows of requests,
so that it can be sent to other processes (`group`)."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

# What most steps have none of, made once.
NO_IDS, NO_VALUES = torch.empty(0, dtype=torch.int64), torch.empty(0)
NO_MASKS = torch.empty(0, 0, dtype=torch.int32)


@dataclass
class Group:
    """Sequences of a step that attend in one form. count: new tokens of each, where absorbed; else 0, any number.

    new, most: new tokens of all together, and the most of one. total, longest: sum and maximum of lens.
    table i32 [B, W]; lens i32 [B], new tokens included; bounds i32 [B + 1], where each one's new tokens begin among
    the group's.
    """

    count: int
    new: int
    most: int
    total: int
    longest: int
    table: Tensor
    lens: Tensor
    bounds: Tensor


@dataclass
class Edits:
    """What biases, penalties and guides do to logits [R, V] before a token is chosen, in this order.

    bias_row, bias_token: i64 [N], and bias: f32 [N], added. repeat_row, repeat_token: i64 [M], and repeat: f32 [M],
    that divides a positive logit and multiplies a negative one. mask_row: i64 [G], and mask: i32 [G, ceil(V / 32)], a
    bit per token that may come.
    """

    bias_row: Tensor = NO_IDS
    bias_token: Tensor = NO_IDS
    bias: Tensor = NO_VALUES
    repeat_row: Tensor = NO_IDS
    repeat_token: Tensor = NO_IDS
    repeat: Tensor = NO_VALUES
    mask_row: Tensor = NO_IDS
    mask: Tensor = NO_MASKS


@dataclass
class StepInput:
    """What a process computes in a step; all on the host. T tokens; B requests that sample, with up to K drafts each.

    Whatever decides what is to be done is a number, not a tensor's content: to look into a tensor costs more.

    tokens, positions, slots: i64 [T], group by group; UNRESOLVED where a token was sampled in the step before and is
        known on the device only. rows: i64 [T], whose token it is (see rows.Rows).
    following: i64 [T], the token behind each, 0 where this step is to sample it.
    bounds: i32 [S + 1], where each sequence's tokens begin.
    copies: i64 [2, N], pages to copy before anything is computed, from and to.
    sampled: i64 [B, K + 1], the places in [T] that logits are wanted of: of each request that samples, the last known
        token and its draft; -1 behind. all_sampled: these are all T, in order. draft: i64 [B, K], -1 behind.
    sampled_rows: i64 [B]. next_positions: i64 [B], where the first token that is sampled will stand in its sequence.
    room: i64 [B], tokens that its pages hold. table: i32 [B, W], its pages.
    settings: temperature, top_k, top_p, min_p, seed [B], as `sample` takes them.
    heat: f32 [B], the temperature of the reported log-probabilities; [0] where all are 1.
    top: how many of the likeliest to report, at the most.
    report: i64 [P], places of prompts whose following token's log-probability is wanted; report_top: as top, of these.
    record: whether to keep what the gates choose.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    rows: Tensor
    following: Tensor
    bounds: Tensor
    copies: Tensor
    sampled: Tensor
    all_sampled: bool
    draft: Tensor
    sampled_rows: Tensor
    next_positions: Tensor
    room: Tensor
    table: Tensor
    settings: list[Tensor]
    heat: Tensor
    top: int
    report: Tensor
    report_top: int
    record: bool
    edits: Edits | None
    groups: list[Group]

    def packed(self) -> dict[str, Tensor]:
        """By names, for a message."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        edits = {f"edits.{f.name}": getattr(self.edits, f.name) for f in fields(Edits)} if self.edits else {}
        settings = {f"settings.{i}": tensor for i, tensor in enumerate(self.settings)}
        groups = {
            f"groups.{i}.{name}": getattr(group, name) for i, group in enumerate(self.groups) for name in GROUP_TENSORS
        }
        numbers = [getattr(self, name) for name in NUMBERS]
        sizes = [getattr(group, name) for group in self.groups for name in GROUP_NUMBERS]
        return {**plain, **edits, **settings, **groups, "numbers": torch.tensor([*numbers, *sizes], dtype=torch.int64)}

    @classmethod
    def unpacked(cls, tensors: dict[str, Tensor]) -> "StepInput":
        numbers = tensors["numbers"].tolist()
        changes = {f.name: tensors[f"edits.{f.name}"] for f in fields(Edits) if f"edits.{f.name}" in tensors}
        groups = [
            Group(
                *numbers[start : start + len(GROUP_NUMBERS)],
                *(tensors[f"groups.{i}.{name}"] for name in GROUP_TENSORS),
            )
            for i, start in enumerate(range(len(NUMBERS), len(numbers), len(GROUP_NUMBERS)))
        ]
        settings = [tensors[f"settings.{i}"] for i in range(5)]
        known: dict[str, Any] = {f.name: tensors[f.name] for f in fields(cls) if f.name in tensors}
        known |= zip(NUMBERS, numbers, strict=False)  # what follows is of the groups
        return cls(**known, settings=settings, edits=Edits(**changes) if changes else None, groups=groups)


NUMBERS = ("all_sampled", "top", "report_top", "record")  # of a step, and of its groups: they are sent as one tensor
GROUP_NUMBERS = ("count", "new", "most", "total", "longest")
GROUP_TENSORS = ("table", "lens", "bounds")


@dataclass
class StepOutput:
    """What comes of it; on the device. None is what the step was not asked for.

    tokens: i64 [B, K + 1], the accepted drafts and one more, then -1. logprobs: f32 [B, K + 1]. accepted: i32 [B];
    None where K is 0. drafts: i64 [B, D], for the next step; -1 behind where the pages end.
    top_ids i64 [B, K + 1, top], top_logprobs f32: the likeliest in each place. report: f32 [P]; report_ids
    i64 [P, top], report_logprobs f32.
    """

    tokens: Tensor | None = None
    logprobs: Tensor | None = None
    accepted: Tensor | None = None
    drafts: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None
    report: Tensor | None = None
    report_ids: Tensor | None = None
    report_logprobs: Tensor | None = None

    def packed(self) -> dict[str, Tensor]:
        return {f.name: value.cpu() for f in fields(self) if (value := getattr(self, f.name)) is not None}
