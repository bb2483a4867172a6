"""Supervised fine-tuning: the same loop as pre-training, on conversations, with a loss on what the assistant writes.

A step takes its samples (see packing), shares them over the processes by tokens, and each process its share over
forward passes. Every learnt token of the global batch has the same weight, or every sample, wherever it was computed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...parallel.data import DataParallel
from ..config import BatchSection
from ..loop import TrainingRun, run_training
from ..progress import Progress, Speed, matmul_peak
from ..schedule import LearningRate, Timeline
from ..settings import Span
from .config import SftConfig
from .packing import Indices, Packed, Plan, collate, passes, share, token_weights
from .samples import Recipe, Samples, prepare_samples
from .students import open_encoder, open_student, trained


def sft(config: SftConfig, backend: str = "auto") -> Path | None:
    """Run, or go on with, the run that `config` describes. Returns the directory of the finished model (Hugging Face
    format; with lora.merge = "none", PEFT's adapter), or None where a signal ended the run early.
    """
    return run_training(config, backend, lambda parallel, progress: Sft(config, parallel, progress))


class Sft(TrainingRun):
    """A step: forward and backward over the samples of the global batch, then the update."""

    def __init__(self, config: SftConfig, parallel: DataParallel, progress: Progress):
        self.config = config
        encoder = open_encoder(config)
        recipe = Recipe(config.data, encoder, config.seed)
        sets, self.fingerprint = prepare_samples(recipe, Path(config.run_dir), parallel, progress)
        self.samples = sets.pop("train")
        self.held_out = sets
        self.plan = Plan(
            self.samples.lengths, config.batch, config.data.seq_len, config.epochs, config.steps, config.seed
        )
        self.total_steps = self.plan.total_steps
        if self.plan.units_per_step < parallel.world_size:
            raise UserError(
                f"a step has {self.plan.units_per_step} samples or rows for {parallel.world_size} processes: "
                "raise batch.samples or batch.tokens, or start fewer processes"
            )
        timeline = Timeline(BatchSection(sequences=1), 1, Span(self.total_steps, "steps"))
        self.lr = LearningRate(config.optim, timeline)
        self.gamma_ends = timeline.first_step_at(config.balance.gamma_until)
        self.student = open_student(config, encoder, parallel.device)
        super().__init__(config, self.student.module, encoder.tokenizer, parallel, progress)
        length = round(float(self.samples.lengths.mean()))
        peak = matmul_peak(parallel.device, next(self.model.parameters()).dtype) * parallel.world_size
        self.speed = Speed(self.student.flops_per_token(length), peak)
        self.tokens = 0
        progress.say(f"{trained(self.model):,} parameters train; {self.plan.epoch(self.total_steps):.2f} epochs")

    @property
    def data_fingerprint(self) -> str:
        return self.fingerprint

    def saved_state(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "base": self.student.base}

    def restore_state(self, state: dict[str, Any]) -> None:
        if state["base"] != self.student.base:
            raise UserError(
                f"{self.config.model} is not the model that the adapters of {self.directory} belong to: restore it, "
                "or use another run_dir"
            )
        self.tokens = state["tokens"]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        tensors = super().tensors()
        scales = [name for name in tensors["model"] if name.endswith("weight_scale_inv")]  # of FP8, which is frozen
        for name in scales:
            del tensors["model"][name]
        return tensors

    def save_model(self, target: Path) -> None:
        self.student.save(target)

    def advice(self, target: Path) -> str:
        return self.student.advice(target)

    # One step.

    def optimize(self, step: int) -> dict[str, Any]:
        self.gradients.zero()
        units = self.plan.step(step)
        count = sum(map(len, units))
        sums: dict[str, Tensor] = {}
        for chosen in self._passes(units):
            losses = self.student.losses(self._batch(chosen, units), len(chosen) / count)
            losses.total.backward()
            for name, value in losses.parts.items():
                sums[name] = sums.get(name, torch.zeros(1, dtype=torch.float64)) + value.double().cpu()
            if self.balancer is not None:
                self.balancer.add(losses.counts)
        found = {name: self.parallel.sum(value).item() for name, value in sums.items()}
        everyone = np.concatenate(units)
        tokens = int(self.samples.lengths[everyone].sum())
        self.tokens += tokens
        gamma = self.config.balance.gamma if step < self.gamma_ends else 0.0
        return (
            found
            | {"batch_samples": count, "batch_tokens": tokens, "batch_learnt": int(self.samples.losses[everyone].sum())}
            | self.update(step, sum(found.values()), self.lr(step), gamma)
        )

    def _passes(self, units: list[Indices]) -> Iterator[Indices]:
        """The samples of each forward pass of this process."""
        lengths = self.samples.lengths
        weights = [int(lengths[unit].sum()) for unit in units]
        mine = [units[unit] for unit in share(weights, self.parallel.rank, self.parallel.world_size)]
        if self.plan.row:
            yield from (row[np.argsort(-lengths[row], kind="stable")] for row in mine)
        else:
            yield from passes(np.concatenate(mine), lengths, self.config.batch.micro_tokens)

    def _batch(self, chosen: Indices, units: list[Indices]) -> Packed:
        weights = token_weights(self.samples.losses, chosen, units, self.config.batch.normalise)
        return collate(self.samples, chosen, weights).to(self.parallel.device)

    def describe(self, values: dict[str, Any], seconds: float) -> str:
        self.speed.update(values["batch_tokens"], seconds)
        values |= {
            "epoch": self.plan.epoch(self.step),
            "tokens": self.tokens,
            "tokens_per_second": self.speed.tokens_per_second,
            "mfu": self.speed.mfu,
        }
        done, total = self.step, self.total_steps
        left = int(self.speed.time_left((total - done) * self.tokens // done))
        load = f"load +{values['max_violation']:.0%} | " if self.balancer is not None else ""
        return (
            f"step {done}/{total} {done / total:.0%} | epoch {values['epoch']:.2f} | loss {values['loss']:.3f} | "
            f"grad {values['grad_norm']:.2f} | {load}{self.speed.tokens_per_second:,.0f} tok/s | "
            f"MFU {self.speed.mfu:.0%} | {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        )

    # Beside the steps.

    def validate(self, values: dict[str, Any]) -> None:
        every = self.config.eval.every
        due = self.step in (1, self.total_steps) or (every and self.step % every == 0)
        if not self.held_out or not due:
            return
        self.model.eval()
        for name, samples in self.held_out.items():
            values[f"validation/{name}"] = self._validation_loss(samples)
        self.model.train()
        found = ", ".join(f"{name} {values[f'validation/{name}']:.3f}" for name in self.held_out)
        self.progress.say(f"step {self.step}: validation, nats per learnt token: {found}")

    @torch.no_grad()
    def _validation_loss(self, samples: Samples) -> float:
        """Mean over the learnt tokens of a set. Processes share the work; all get the result."""
        parts = passes(np.arange(len(samples)), samples.lengths, self.config.batch.micro_tokens)
        nats = torch.zeros((), dtype=torch.float64)
        for index in self.parallel.share(len(parts)):
            batch = collate(samples, parts[index], np.ones(len(parts[index]))).to(self.parallel.device)
            nats -= self.student.logp(batch).double().sum().cpu()
        return self.parallel.sum(nats).item() / int(samples.losses.sum())
