"""On-policy distillation: the student writes, and learns at each of its own tokens what the teacher would have thought.

A student that only reads the teacher's texts never sees its own mistakes. Here it does, with a full distribution per
token in place of one reward per text. What it wrote is taken as given: no gradient passes through the choice of tokens
(Agarwal et al. 2024, "On-policy distillation of language models", algorithm 1). A share of the samples may come from
traces.
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...core.encoding import detect_format
from ...core.generate import Completion, SamplingParams, make_rollout
from ...core.step import Routing
from ...errors import UserError
from ...parallel.data import DataParallel
from ..chat_data import data_files, encode_example, load_rows
from ..config import BatchSection
from ..data.order import permutation, stream_key
from ..grpo.config import PLAIN_TEMPLATE
from ..grpo.prompts import PromptFormat, PromptSet, messages_of
from ..grpo.rollouts import completion_seed
from ..grpo.sample import Sample
from ..grpo.update import micro_batches, pack
from ..loop import TrainingRun, run_training
from ..progress import Progress
from ..schedule import LearningRate, Timeline
from .divergence import divergence
from .student_config import OnPolicyConfig
from .students import head, hidden_states, load_student, load_teacher

OUTSIDE = "outside"  # finish reason of a sample that left the vocabulary


def onpolicy(config: OnPolicyConfig, backend: str = "auto") -> Path | None:
    """Run, or go on with, the run that `config` describes. Returns the directory of the finished model (Hugging Face
    format), or None where a signal ended the run early; its checkpoint is then saved.
    """
    return run_training(config, backend, lambda parallel, progress: OnPolicyRun(config, parallel, progress))


class OnPolicyRun(TrainingRun):
    """A step: replies of the student, the divergence at every token of them, one update."""

    def __init__(self, config: OnPolicyConfig, parallel: DataParallel, progress: Progress) -> None:
        self.config = config
        if config.on_policy > 0 and not config.prompts:
            raise UserError("prompts is empty: name files of JSON lines with prompts for the student")
        if config.on_policy < 1 and not config.traces:
            raise UserError("traces is empty: name files of conversations, or set on_policy = 1")
        if config.on_policy < 1 and config.format == PLAIN_TEMPLATE:
            raise UserError(f"the template {PLAIN_TEMPLATE!r} holds no traces: set on_policy = 1, or a chat format")
        self.teacher, tokenizer = load_teacher(config.teacher, parallel.device)
        model = load_student(config, tokenizer, parallel)
        format = config.format or detect_format(tokenizer)
        self.format = PromptFormat(tokenizer, format, config.thinking)
        self.context = min(model.config.max_position_embeddings, self.teacher.config.max_position_embeddings)
        self.prompts = PromptSet.load(config.prompts) if config.on_policy > 0 else None
        short = self.format.check(self.prompts, self.context, config.max_tokens) if self.prompts is not None else 0
        if short:
            progress.say(f"note: {short:,} prompts leave less room than max_tokens; their replies are cut earlier")
        super().__init__(config, model, tokenizer, parallel, progress)
        self.traces = self._load_traces(format) if config.on_policy < 1 else []
        timeline = Timeline(BatchSection(sequences=1, micro_batch=1), 1, config.length)
        self.total_steps, self.lr = timeline.total_steps, LearningRate(config.optim, timeline)
        self.gamma_ends = timeline.first_step_at(config.balance.gamma_until)
        self.rollout = make_rollout(model, decode=partial(tokenizer.decode, skip_special=True))
        self.seconds_per_step = 0.0
        self._order: tuple[int, list[int]] | None = None

    def _load_traces(self, format: str) -> list[Sample]:
        samples = []
        for row in load_rows(self.config.traces):
            for ids, mask in encode_example(row, self.tokenizer, format):
                if len(ids) <= self.context:
                    start = mask.index(True)
                    written = mask[start:]
                    samples.append(Sample(ids, start, [0.0] * len(written), written, "", 0, "stop"))
        if not samples:
            raise UserError(f"no trace fits into the context of {self.context} tokens")
        return samples

    @property
    def data_fingerprint(self) -> str:
        digest = hashlib.sha256((self.prompts.fingerprint if self.prompts is not None else "").encode())
        for path in data_files(self.config.traces) if self.config.on_policy < 1 else []:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def began(self) -> None:
        self.rollout.weight_version = self.step
        self.model.refresh()

    def optimize(self, step: int) -> dict[str, Any]:
        config, device = self.config, self.parallel.device
        samples = self.samples(step)
        numbers = [sum(s.written_tokens for s in samples), sum(s.truncated for s in samples), len(samples)]
        numbers.append(sum(s.finish_reason == OUTSIDE for s in samples))
        tokens, truncated, count, outside = self.parallel.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()
        self.gradients.zero()
        gamma = config.balance.gamma if step < self.gamma_ends else 0.0
        if self.balancer is not None:  # there may be no sample at all on this process
            experts = self.model.config.n_routed_experts
            self.balancer.add({layer: torch.zeros(experts, device=device) for layer in self.balancer.layers})
        total = torch.zeros((), dtype=torch.float64)
        learnt = [sample for sample in samples if sample.written_tokens]
        for batch in micro_batches(learnt, config.micro_batch_tokens):
            packed = pack(batch, device)
            routing = Routing(balance_sequences=packed.cu_seqlens if config.balance.alpha else None)
            hidden = hidden_states(self.model, packed, routing)
            with torch.no_grad():
                wanted = hidden_states(self.teacher, packed)
            distances = divergence(
                hidden, head(self.model, self.tokenizer), wanted, head(self.teacher, self.tokenizer), config.beta
            )
            loss = distances.sum() / tokens
            if config.balance.alpha:
                balance = sum(routing.balance.values(), torch.zeros_like(loss))
                loss = loss + config.balance.alpha * balance * (len(batch) / count)
            loss.backward()
            total += loss.detach().double().cpu()
            if self.balancer is not None and routing.counts:
                self.balancer.add(routing.counts)
        (whole,) = self.parallel.sum(total[None]).tolist()
        values = {
            "loss": whole,
            "completions/mean_length": tokens / count,
            "completions/clipped_ratio": truncated / count,
            "completions/outside_vocabulary": outside / count,
        }
        values |= self.update(step, whole, self.lr(step), gamma)
        self.rollout.weights_changed()
        return values

    def samples(self, step: int) -> list[Sample]:
        """This process's share of the samples of a step. Which are the student's own, and which traces, follows from
        seed and step."""
        config = self.config
        mine = self.parallel.share(config.samples)
        own_count = round(config.on_policy * config.samples)
        places = permutation(config.samples, stream_key("on-policy", config.seed, step)).tolist()
        own = [i for i in mine if places[i] < own_count]
        chosen = [self._trace(step * config.samples + i) for i in mine if places[i] >= own_count]
        return self._write([step * config.samples + i for i in own]) + chosen

    def _trace(self, index: int) -> Sample:
        """All traces in random order, then again in another."""
        epoch, place = divmod(index, len(self.traces))
        if self._order is None or self._order[0] != epoch:
            order = permutation(len(self.traces), stream_key("traces", self.config.seed, epoch)).tolist()
            self._order = epoch, order
        return self.traces[self._order[1][place]]

    def _write(self, indices: list[int]) -> list[Sample]:
        """Replies of the student to these prompts of the run."""
        if self.prompts is None or not indices:
            return []
        config = self.config
        rows = [self.prompts.rows[self.prompts.at(index, config.seed)] for index in indices]
        prompts = [self.format.encode(messages_of(row)) for row in rows]
        params = [
            SamplingParams(
                config.temperature, seed=completion_seed(config.seed, index, 0), max_tokens=config.max_tokens,
                stop_token_ids=(self.format.end_id, self.tokenizer.eos_id),
            )
            for index in indices
        ]  # fmt: skip
        self.model.eval()
        samples = []
        size = max(1, config.tokens_at_once // (max(map(len, prompts)) + config.max_tokens))
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            samples += [self._sample(completion) for completion in self.rollout.generate(prompts[part], params[part])]
        self.model.train()
        return samples

    def _sample(self, completion: Completion) -> Sample:
        """A reply up to the first id that pads the student's vocabulary: it is no token, and the teacher has none."""
        ids = completion.token_ids
        end = next((place for place, token in enumerate(ids) if token >= self.tokenizer.vocab_size), len(ids))
        reason = completion.finish_reason or "length"
        return Sample(
            completion.prompt_ids + ids[:end], len(completion.prompt_ids), completion.logprobs[:end], [True] * end, "",
            completion.weight_version, reason if end == len(ids) else OUTSIDE,
        )  # fmt: skip

    def describe(self, values: dict[str, Any], seconds: float) -> str:
        now = self.seconds_per_step
        self.seconds_per_step = seconds if not now else 0.9 * now + 0.1 * seconds
        left = int(self.seconds_per_step * (self.total_steps - self.step))
        return (
            f"step {self.step}/{self.total_steps} {self.step / self.total_steps:.0%} | "
            f"divergence {values['loss']:.4f} | grad {values['grad_norm']:.2f} | "
            f"length {values['completions/mean_length']:.1f} | {seconds:.1f} s | "
            f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        )
