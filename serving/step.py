"""A step as tensors: all that a process needs to compute it, and all that comes of it. Nothing in it knows of requests,
so that it can be sent to other processes (`group`)."""

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor


def _none(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype)


@dataclass
class Group:
    """Sequences of a step that attend in one form. count: new tokens of each, where absorbed; else 0, any number.

    table i32 [B, W]; lens i32 [B], new tokens included; new i64 [B].
    """

    count: int
    table: Tensor
    lens: Tensor
    new: Tensor


@dataclass
class Edits:
    """What biases, penalties and guides do to logits [R, V] before a token is chosen, in this order.

    bias_row, bias_token: i64 [N], and bias: f32 [N], added. repeat_row, repeat_token: i64 [M], and repeat: f32 [M],
    that divides a positive logit and multiplies a negative one. mask_row: i64 [G], and mask: i32 [G, ceil(V / 32)], a
    bit per token that may come.
    """

    bias_row: Tensor = field(default_factory=lambda: _none(torch.int64, 0))
    bias_token: Tensor = field(default_factory=lambda: _none(torch.int64, 0))
    bias: Tensor = field(default_factory=lambda: _none(torch.float32, 0))
    repeat_row: Tensor = field(default_factory=lambda: _none(torch.int64, 0))
    repeat_token: Tensor = field(default_factory=lambda: _none(torch.int64, 0))
    repeat: Tensor = field(default_factory=lambda: _none(torch.float32, 0))
    mask_row: Tensor = field(default_factory=lambda: _none(torch.int64, 0))
    mask: Tensor = field(default_factory=lambda: _none(torch.int32, 0, 0))

    @property
    def any(self) -> bool:
        return bool(len(self.bias_row) or len(self.repeat_row) or len(self.mask_row))


@dataclass
class StepInput:
    """What a process computes in a step; all on the host. T tokens; B requests that sample, with up to K drafts each.

    tokens, positions, slots: i64 [T], group by group; UNRESOLVED where a token was sampled in the step before and is
        known on the device only. rows: i64 [T], whose token it is (see batch.Rows).
    following: i64 [T], the token behind each, 0 where this step is to sample it.
    copies: i64 [2, N], pages to copy before anything is computed, from and to.
    sampled: i64 [B, K + 1], the places in [T] that logits are wanted of: of each request that samples, the last known
        token and its draft; -1 behind. draft: i64 [B, K], -1 behind. sampled_rows: i64 [B]. next_positions: i64 [B],
        where the first token that is sampled will stand in its sequence. room: i64 [B], tokens that its pages hold.
    table: i32 [B, W], its pages. settings: temperature, top_k, top_p, min_p, seed [B], as `sample` takes them.
    heat: f32 [B], the temperature of the reported log-probabilities; top: i64 [B], how many of the likeliest to report.
    report: i64 [P], places of prompts whose following token's log-probability is wanted; report_top: i64 [P].
    record: whether to keep what the gates choose.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    rows: Tensor
    following: Tensor
    copies: Tensor
    sampled: Tensor
    draft: Tensor
    sampled_rows: Tensor
    next_positions: Tensor
    room: Tensor
    table: Tensor
    settings: list[Tensor]
    heat: Tensor
    top: Tensor
    report: Tensor
    report_top: Tensor
    record: bool
    edits: Edits
    groups: list[Group]

    def packed(self) -> dict[str, Tensor]:
        """By names, for a message."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        edits = {f"edits.{f.name}": getattr(self.edits, f.name) for f in fields(self.edits)}
        settings = {f"settings.{i}": tensor for i, tensor in enumerate(self.settings)}
        groups = {
            f"groups.{i}.{name}": getattr(group, name)
            for i, group in enumerate(self.groups)
            for name in ("table", "lens", "new")
        }
        flags = torch.tensor([self.record, *(group.count for group in self.groups)])
        return {**plain, **edits, **settings, **groups, "flags": flags}

    @classmethod
    def unpacked(cls, tensors: dict[str, Tensor]) -> "StepInput":
        record, *counts = tensors["flags"].tolist()
        edits = Edits(**{f.name: tensors[f"edits.{f.name}"] for f in fields(Edits)})
        groups = [
            Group(count, *(tensors[f"groups.{i}.{name}"] for name in ("table", "lens", "new")))
            for i, count in enumerate(counts)
        ]
        settings = [tensors[f"settings.{i}"] for i in range(5)]
        known = {f.name: tensors[f.name] for f in fields(cls) if f.name in tensors}
        return cls(**known, settings=settings, record=bool(record), edits=edits, groups=groups)


@dataclass
class StepOutput:
    """What comes of it; on the device.

    tokens: i64 [B, K + 1], the accepted drafts and one more, then -1. logprobs: f32 [B, K + 1]. accepted: i32 [B].
    drafts: i64 [B, D], for the next step; -1 behind where the pages end. top_ids i64 [B, K + 1, top], top_logprobs f32:
    the likeliest in each place. report: f32 [P]; report_ids i64 [P, top], report_logprobs f32.
    """

    tokens: Tensor
    logprobs: Tensor
    accepted: Tensor
    drafts: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    report: Tensor
    report_ids: Tensor
    report_logprobs: Tensor

    def packed(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name).cpu() for f in fields(self)}
