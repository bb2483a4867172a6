"""GRPO as one loop: prompts, completions, rewards, advantages within groups, updates (DeepSeekMath 4.1, R1 report 2.2).

Every step writes its completions with the weights of that moment, judges them, and moves the weights once for each
mini-batch. Prompts, seeds and mini-batches follow from the run's seed and the place of a prompt in the run, so a run
goes on after an interruption as if there had been none, and several processes do what one does, up to rounding (which
may turn a token that was nearly tied, and with it the rest of its completion).
"""

import json
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.encoding import detect_format
from ...core.files import atomic_write
from ...core.generate import SamplingParams, make_rollout
from ...core.model import DeepseekV3
from ...core.tokenizer import Tokenizer
from ...errors import UserError
from ...parallel.data import DataParallel
from ..checkpointing import model_tensors
from ..config import BatchSection
from ..data.order import permutation, stream_key
from ..loop import METRICS, TrainingRun, run_training
from ..metrics import read_metrics
from ..progress import Progress
from ..rewards.registry import build
from ..schedule import LearningRate, Timeline
from .advantages import advantages
from .collect import Batch, Collector, Record, judge, statistics
from .config import GrpoConfig
from .environment import Environment, OwnEnvironment, SingleTurn
from .loss import BatchSize
from .pictures import draw
from .prompts import PromptFormat, PromptSet
from .rollouts import Rollouts
from .tally import Tally, gather
from .tools import ToolEnvironment, load_function
from .update import Learner, make_reference

COMPLETIONS = "completions.jsonl"
WARNING_STEPS = 20  # between two warnings about truncation


def grpo(config: GrpoConfig, backend: str = "auto") -> Path | None:
    """Run, or go on with, the run that `config` describes. Returns the directory of the finished model (Hugging Face
    format), or None where a signal ended the run early; its checkpoint is then saved.
    """
    return run_training(config, backend, lambda parallel, progress: GrpoRun(config, parallel, progress))


class GrpoRun(TrainingRun):
    """A step: a rollout, its rewards, and the updates made from them."""

    def __init__(self, config: GrpoConfig, parallel: DataParallel, progress: Progress):
        self.config = config
        if not config.model:
            raise UserError("model is not set: name the directory of the model to train")
        if not config.data.prompts:
            raise UserError("data.prompts is empty: name files of JSON lines with prompts")
        if not config.rewards:
            raise UserError('rewards is empty: say what is good, for example [{ name = "accuracy_math" }]')
        if config.prompts_per_step < parallel.world_size:
            raise UserError(
                f"prompts_per_step is {config.prompts_per_step} for {parallel.world_size} processes: a group is never "
                "spread, so raise it, or start fewer processes"
            )
        tokenizer = Tokenizer.load(config.model)
        self.prompts = PromptSet.load(config.data.prompts)
        self.held_out = PromptSet.load(config.data.validation) if config.data.validation and config.eval.every else None
        format = PromptFormat(tokenizer, config.data.format or detect_format(tokenizer), config.data.thinking)
        self.rewards = build(config.rewards)
        model = load_policy(config, parallel)
        context = model.config.max_position_embeddings
        self._check_data(format, context, parallel, progress)
        self.reference = make_reference(model) if config.loss.beta else None
        super().__init__(config, model, tokenizer, parallel, progress)
        timeline = Timeline(BatchSection(sequences=1, micro_batch=1), 1, config.length)
        self.total_steps, self.lr = timeline.total_steps, LearningRate(config.optim, timeline)
        self.gamma_ends = timeline.first_step_at(config.balance.gamma_until)
        self.longer = [(timeline.first_step_at(longer.at), longer.max_tokens) for longer in config.rollout.longer]
        environment = make_environment(config)
        self.rollout = make_rollout(model)
        self.rollouts = Rollouts(
            self.rollout, format, context, config.rollout.tokens_at_once, environment,
            1 if environment is SingleTurn else config.environment.max_turns, config.replay == "rollout",
        )  # fmt: skip
        self.collector = Collector(self.rollouts, self.rewards, self.prompts, config, parallel)
        self.learner = Learner(model, self.reference, config, self.balancer)
        self.seconds_per_step, self.next_warning = 0.0, 0

    def _check_data(self, format: PromptFormat, context: int, parallel: DataParallel, progress: Progress) -> None:
        """Once, by process 0: parsing every gold answer takes a while."""
        failed = None
        max_tokens = max(
            [self.config.rollout.max_tokens, *(longer.max_tokens for longer in self.config.rollout.longer)]
        )
        if parallel.is_main:
            try:
                for prompts in filter(None, (self.prompts, self.held_out)):
                    placed = zip(prompts.rows, prompts.places, strict=True)
                    self.rewards.check_rows([{**row, "_where": place} for row, place in placed])
                    if self.config.environment.factory:
                        continue
                    if short := format.check(prompts, context, max_tokens):
                        progress.say(
                            f"note: the context of {context} tokens leaves {short} of {len(prompts)} prompts less room "
                            f"than max_tokens = {max_tokens}: their completions are cut earlier"
                        )
            except UserError as error:
                failed = str(error)
        if failed := parallel.broadcast_object(failed):
            raise UserError(failed)

    # What the frame asks.

    @property
    def data_fingerprint(self) -> str:
        return self.prompts.fingerprint

    def run(self) -> Path | None:
        with self.rewards:
            return super().run()

    def saved_state(self) -> dict[str, Any]:
        return {"prompts": self.collector.index}

    def restore_state(self, state: dict[str, Any]) -> None:
        self.collector.index = state["prompts"]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The reference is part of a checkpoint where it changes; else it is the model that the run began with."""
        tensors = super().tensors()
        if self.reference is not None and self.config.reference_reset:
            tensors["reference"] = model_tensors(self.reference)
        return tensors

    def began(self) -> None:
        self.rollout.weight_version = self.step
        self.model.refresh()
        path = self.directory / COMPLETIONS
        if self.parallel.is_main and path.exists():  # what an interrupted run wrote behind its checkpoint comes again
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < self.step]
            with atomic_write(path, "w") as file:
                file.writelines(kept)

    def draw_log(self) -> None:
        draw(read_metrics(self.directory / METRICS), self.directory)

    # One step.

    def optimize(self, step: int) -> dict[str, Any]:
        values = self._measure() if step == 0 else {}
        max_tokens = self.max_tokens(step)
        self.model.eval()
        batch = self.collector.collect(max_tokens)
        self.model.train()
        began = time.perf_counter()
        self._set_advantages(batch)
        values |= statistics(batch.seen) | {"groups": len(batch.records)}
        values |= self._learn(step, batch, max_tokens)
        self._log_completions(step, batch)
        if self.reference is not None and self.config.reference_reset and (step + 1) % self.config.reference_reset == 0:
            self._reset_reference()
        self.rollout.weights_changed()
        tokens = sum(length for record in batch.seen for length in record.written)
        values |= {
            "time/rollout": batch.seconds["rollout"],
            "time/reward": batch.seconds["reward"],
            "time/update": time.perf_counter() - began,
            "rollout_tokens_per_second": tokens / max(batch.seconds["rollout"], 1e-9),
        }
        self._warn(step, batch, values)
        return values

    def max_tokens(self, step: int) -> int:
        """Tokens that a completion of this step may have."""
        reached = [tokens for at, tokens in self.longer if at <= step]
        return reached[-1] if reached else self.config.rollout.max_tokens

    def _set_advantages(self, batch: Batch) -> None:
        found = advantages([record.rewards for record in batch.records], self.config.scale_rewards)
        by_index = {record.index: values for record, values in zip(batch.records, found, strict=True)}
        for group in batch.groups:
            for sample, advantage in zip(group.samples, by_index[group.index], strict=True):
                sample.advantage = advantage

    def _learn(self, step: int, batch: Batch, max_tokens: int) -> dict[str, Any]:
        """All updates of the step. Mini-batches are drawn from all samples, wherever they are: each process adds the
        gradients of those that it has."""
        if not batch.records:
            return {"loss": 0.0, "lr": self.lr(step), "updates": 0}
        own = {(group.index, member): sample for group in batch.groups for member, sample in enumerate(group.samples)}
        self.learner.prepare(list(own.values()))
        keys = [(record.index, member) for record in batch.records for member in range(self.config.group_size)]
        weights = [tokens for record in batch.records for tokens in self._learning_tokens(record)]
        gamma = self.config.balance.gamma if step < self.gamma_ends else 0.0
        losses: list[float] = []
        norms: list[float] = []
        tally, values = Tally(), {}
        for epoch in range(self.config.inner_epochs):
            order = permutation(len(keys), stream_key("mini-batches", self.config.seed, step, epoch)).tolist()
            for chosen in cut(order, self.config.mini_batches):
                size = BatchSize(len(chosen), sum(weights[place] for place in chosen), max_tokens)
                self.gradients.zero()
                loss, part = self.learner.backward([own[keys[p]] for p in sorted(chosen) if keys[p] in own], size)
                (whole,) = self.parallel.sum(torch.tensor([loss], dtype=torch.float64)).tolist()
                values = self.update(step, whole, self.lr(step), gamma)
                losses.append(whole)
                norms.append(values["grad_norm"])
                tally.merge([part])
        tally = Tally().merge(gather(self.parallel, tally))
        mean = {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms), "updates": len(losses)}
        return values | tally.values() | mean

    def _learning_tokens(self, record: Record) -> list[int]:
        masked = self.config.loss.mask_truncated
        return [0 if masked and cut else n for n, cut in zip(record.written, record.truncated, strict=True)]

    @torch.no_grad()
    def _reset_reference(self) -> None:
        assert self.reference is not None
        policy = model_tensors(self.model)
        for name, tensor in model_tensors(self.reference).items():
            tensor.detach().copy_(policy[name])

    # Beside the steps.

    def validate(self, values: dict[str, Any]) -> None:
        every = self.config.eval.every
        if every and (self.step % every == 0 or self.step == self.total_steps):
            values |= self._measure()

    def _measure(self) -> dict[str, Any]:
        """Greedy completions of the held-out prompts: their rewards, length, and the share that was cut off."""
        if self.held_out is None:
            return {}
        rows = self.held_out.rows[: self.config.eval.prompts]
        mine = [(place, rows[place]) for place in self.parallel.share(len(rows))]
        params = SamplingParams(temperature=0.0, max_tokens=self.max_tokens(self.step))
        self.model.eval()
        groups = self.rollouts.groups(mine, 1, params, self.config.seed)
        self.model.train()
        judge(groups, self.rewards)
        records = [r for part in gather(self.parallel, [Record.of(group) for group in groups]) for r in part]
        found = statistics(records)
        values: dict[str, Any] = {
            f"validation/{key.removesuffix('/mean')}": v for key, v in found.items() if key.endswith("/mean")
        }
        values |= {
            "validation/reward": found.get("reward"),
            "validation/length": found["completions/mean_length"],
            "validation/clipped_ratio": found["completions/clipped_ratio"],
        }
        shown = ", ".join(
            f"{key.removeprefix('validation/')} {value:.3f}" for key, value in values.items() if value is not None
        )
        self.progress.say(f"step {self.step}: held-out prompts, greedy: {shown}")
        return values

    def _log_completions(self, step: int, batch: Batch) -> None:
        """The first groups of the step; they are process 0's."""
        if not self.parallel.is_main:
            return
        lines = []
        for group in batch.groups[: self.config.log_completions]:
            for sample in group.samples:
                prompt = self.tokenizer.decode(sample.token_ids[: sample.prompt_length])
                line = {
                    "step": step, "index": group.index, "prompt": prompt, "completion": sample.text,
                    "reward": sample.reward, "rewards": sample.rewards, "advantage": sample.advantage,
                    "tokens": sample.written_tokens, "turns": sample.turns, "finish_reason": sample.finish_reason,
                }  # fmt: skip
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        if lines:
            with open(self.directory / COMPLETIONS, "a", encoding="utf-8") as file:
                file.writelines(lines)

    def _warn(self, step: int, batch: Batch, values: dict[str, Any]) -> None:
        share = values["completions/clipped_ratio"]
        if share > self.config.truncation_warning and step >= self.next_warning:
            self.next_warning = step + WARNING_STEPS
            self.progress.say(
                f"step {step}: {share:.0%} of the completions were cut off at {self.max_tokens(step)} tokens: "
                "they read as failures; raise rollout.max_tokens"
            )
        for problem, count in batch.problems.items():
            self.progress.say(f"step {step}: {problem} ({count})")

    def describe(self, values: dict[str, Any], seconds: float) -> str:
        now = self.seconds_per_step
        self.seconds_per_step = seconds if not now else 0.9 * now + 0.1 * seconds
        left = int(self.seconds_per_step * (self.total_steps - self.step))
        kl = f" | kl {values['kl']:.4f}" if "kl" in values else ""
        return (
            f"step {self.step}/{self.total_steps} {self.step / self.total_steps:.0%} | "
            f"reward {values.get('reward', float('nan')):.3f} | dead {values['frac_reward_zero_std']:.0%} | "
            f"length {values['completions/mean_length']:.1f} | entropy {values.get('entropy', float('nan')):.3f}{kl} | "
            f"rollout {values['time/rollout']:.1f} s ({values['rollout_tokens_per_second']:,.0f} tok/s), "
            f"update {values['time/update']:.1f} s | {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        )


def cut(items: list[int], parts: int) -> list[list[int]]:
    """Neighbours together, sizes that differ by at most one."""
    edges = [len(items) * number // parts for number in range(parts + 1)]
    return [items[start:end] for start, end in pairwise(edges)]


def load_policy(config: GrpoConfig, parallel: DataParallel) -> DeepseekV3:
    """The model to train. Its MTP modules stay as they are: no completion asks for them."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = DeepseekV3.from_pretrained(config.model, dtype=dtype, device=parallel.device, fp8="dequantize")
    for layer in range(model.config.num_hidden_layers, model.config.num_layers_with_mtp):
        model.model.layers[str(layer)].requires_grad_(False)
    model.recompute = config.recompute == "full"
    return model.train()


def make_environment(config: GrpoConfig) -> Callable[[], Environment]:
    """What makes the environment of an episode."""
    section = config.environment
    if section.factory:
        factory = load_function(section.factory, "environment.factory")
        return partial(OwnEnvironment, factory, section.factory, section.timeout)
    if section.tools:
        functions = [load_function(name, "environment.tools") for name in section.tools]
        return partial(ToolEnvironment, functions, section.tool_timeout)
    return SingleTurn
