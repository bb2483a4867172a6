"""Distillation with the teacher's probabilities on its own traces: cross-entropy, and KL to the teacher's top k.

    L = ce_weight * -log q(token) + kl_weight * KL(P || Q)

averaged over the learnt tokens of the global batch. P is known by its k likeliest tokens and their sum; what is left is
one outcome (see divergence.py). Measured on small models, the second term gains nothing over the first at 1.7 times the
cost, so plain fine-tuning is the default of `dsv3 train distill`, and this is for those who have a large teacher's
probabilities anyway.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core.checkpoint import save_pretrained
from ...core.step import Routing
from ...errors import UserError
from ...ops.loss import token_logp
from ...parallel.data import DataParallel
from ..config import BatchSection
from ..loop import TrainingRun, run_training
from ..progress import Progress
from ..schedule import LearningRate, Timeline
from ..settings import Span
from ..sft.config import SftConfig
from ..sft.packing import Indices, Packed, Plan, collate, passes, share, token_weights
from ..sft.samples import Recipe, prepare_samples
from ..sft.students import ChatEncoder
from .divergence import top_k_divergence
from .student_config import LogitsConfig
from .students import head, hidden_states, load_student, load_teacher
from .teacher import checkpoint_hash
from .top_k import LiveTopK, TeacherTopK, store


def logits(config: LogitsConfig, backend: str = "auto") -> Path | None:
    """Run, or go on with, the run that `config` describes. Returns the directory of the finished model (Hugging Face
    format), or None where a signal ended the run early; its checkpoint is then saved.
    """
    return run_training(config, backend, lambda parallel, progress: LogitsRun(config, parallel, progress))


class LogitsRun(TrainingRun):
    """A step: both losses on a batch of traces, one update."""

    def __init__(self, config: LogitsConfig, parallel: DataParallel, progress: Progress) -> None:
        self.config = config
        teacher, tokenizer = load_teacher(config.teacher, parallel.device)
        model = load_student(config, tokenizer, parallel)
        context = min(model.config.max_position_embeddings, teacher.config.max_position_embeddings)
        if config.data.seq_len > context:
            raise UserError(
                f"data.seq_len is {config.data.seq_len}, student and teacher hold {context} tokens: lower it"
            )
        self.encoder = ChatEncoder(SftConfig(model=config.teacher.model, data=config.data))
        run_dir = Path(config.run_dir)
        sets, self._fingerprint = prepare_samples(
            Recipe(config.data, self.encoder, config.seed), run_dir, parallel, progress
        )
        self.samples = sets["train"]
        plan = Plan(self.samples.lengths, config.batch, config.data.seq_len, config.epochs, config.steps, config.seed)
        self.plan, self.total_steps = plan, plan.total_steps
        live = LiveTopK(teacher, tokenizer, config.k)
        self.top_k: TeacherTopK = live
        if config.store:
            digest = checkpoint_hash(Path(config.teacher.model), run_dir) if parallel.is_main else ""
            identity = {"traces": self._fingerprint, "teacher": config.teacher.model, "sha256": digest}
            self.top_k = store(
                run_dir / "top_k", live, self.samples, identity, config.batch.micro_tokens, parallel, progress
            )
        super().__init__(config, model, tokenizer, parallel, progress)
        timeline = Timeline(BatchSection(sequences=1, micro_batch=1), 1, Span(self.total_steps, "steps"))
        self.lr = LearningRate(config.optim, timeline)
        self.gamma_ends = timeline.first_step_at(config.balance.gamma_until)
        self.seconds_per_step = 0.0

    def save_model(self, target: Path) -> None:
        save_pretrained(self.model, self.model.config, target, also=self.encoder.save_tokenizer)

    @property
    def data_fingerprint(self) -> str:
        return self._fingerprint

    def optimize(self, step: int) -> dict[str, Any]:
        config, device = self.config, self.parallel.device
        units = self.plan.step(step)
        place = share([int(self.samples.lengths[u].sum()) for u in units], self.parallel.rank, self.parallel.world_size)
        self.gradients.zero()
        if self.balancer is not None:  # there may be no sample at all on this process
            experts = self.model.config.n_routed_experts
            self.balancer.add({layer: torch.zeros(experts, device=device) for layer in self.balancer.layers})
        sums = torch.zeros(2, dtype=torch.float64)
        mine = [units[i] for i in place]
        for chosen in passes(np.concatenate(mine), self.samples.lengths, config.batch.micro_tokens) if mine else []:
            weights = token_weights(self.samples.losses, chosen, units, config.batch.normalise)
            packed = collate(self.samples, chosen, weights).to(device)
            sums += self._backward(chosen, packed, sum(map(len, units)))
        ce, kl = self.parallel.sum(sums).tolist()
        loss = config.ce_weight * ce + config.kl_weight * kl
        gamma = config.balance.gamma if step < self.gamma_ends else 0.0
        values = {"loss": loss, "ce": ce, "kl": kl, "epoch": self.plan.epoch(step + 1)}
        return values | self.update(step, loss, self.lr(step), gamma)

    def _backward(self, chosen: Indices, packed: Packed, samples: int) -> torch.Tensor:
        """Add the gradients of one pass; its two losses, f64 [2]."""
        config = self.config
        routing = Routing(balance_sequences=packed.cu_seqlens if config.balance.alpha else None)
        hidden = hidden_states(self.model, packed, routing)
        ids, log_p = self.top_k.at(chosen, packed)
        weight = self.model.head_weight.to(hidden.dtype)
        ce = -(token_logp(hidden, weight, packed.targets) * packed.weights).sum()
        known = top_k_divergence(hidden, head(self.model, self.tokenizer), ids, log_p)
        kl = (known * packed.weights).sum()
        loss = config.ce_weight * ce + config.kl_weight * kl
        if config.balance.alpha:
            balance = sum(routing.balance.values(), torch.zeros_like(loss))
            loss = loss + config.balance.alpha * balance * (packed.samples / samples)
        loss.backward()
        if self.balancer is not None and routing.counts:
            self.balancer.add(routing.counts)
        return torch.stack([ce.detach(), kl.detach()]).double().cpu()

    def describe(self, values: dict[str, Any], seconds: float) -> str:
        now = self.seconds_per_step
        self.seconds_per_step = seconds if not now else 0.9 * now + 0.1 * seconds
        left = int(self.seconds_per_step * (self.total_steps - self.step))
        return (
            f"step {self.step}/{self.total_steps} {self.step / self.total_steps:.0%} | ce {values['ce']:.3f} | "
            f"kl {values['kl']:.3f} | grad {values['grad_norm']:.2f} | {seconds:.1f} s | "
            f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        )
