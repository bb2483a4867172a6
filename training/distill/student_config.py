"""The settings of students that learn from a teacher's probabilities: teacher and student are models of ours, with one
tokenizer."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ...errors import UserError
from ..config import THOUSAND, BalanceSection, OptimSection, RunConfig
from ..settings import Count, NonNegative, Positive, Section, Share, Size, Span
from ..sft.config import FreshSection, SftBatchSection, SftDataSection


@dataclass(frozen=True)
class StudentOptim(OptimSection):
    """AdamW without weight decay."""

    lr: Positive = 1e-5
    weight_decay: NonNegative = 0.0


@dataclass(frozen=True)
class StudentBalance(BalanceSection):
    """The experts of a student that is trained already keep their balance; a fresh one wants gamma = 0.001."""

    gamma: NonNegative = 0.0
    alpha: NonNegative = 0.0


@dataclass(frozen=True)
class TeacherModelSection(Section):
    """A model of ours whose probabilities are learnt. precision: "" keeps the checkpoint's."""

    model: str = ""
    precision: Literal["", "fp32", "bf16"] = ""


@dataclass(frozen=True)
class StudentConfig(RunConfig):
    """Who learns from whom: the model of the directory `model`, or a `fresh` one with the teacher's tokenizer."""

    model: str = ""
    fresh: FreshSection = field(default_factory=FreshSection)
    teacher: TeacherModelSection = TeacherModelSection()
    optim: StudentOptim = StudentOptim()
    balance: StudentBalance = StudentBalance()


@dataclass(frozen=True)
class OnPolicyConfig(StudentConfig):
    """The student writes, the teacher says how likely each next token was (GKD, Agarwal et al. 2024).

    prompts: files of JSON lines with `prompt`. traces: files of conversations, for the share of samples that the
    student does not write itself, 1 - on_policy. format: a chat format, "r1-zero" (the plain template), or "" for that
    of the tokenizer. beta: of the divergence, from 0 (forward KL) over Jensen-Shannon to 1 (reverse KL); see
    divergence.py. samples: of a step, over all processes.
    """

    fixed: ClassVar[tuple[str, ...]] = (
        *("model", "fresh", "teacher", "prompts", "traces", "format", "samples", "on_policy", "beta", "temperature"),
        *("max_tokens", "seed", "precision", "ema_decay", "optim.bf16_moments"),
    )

    run_dir: str = "runs/onpolicy"
    length: Span = THOUSAND
    prompts: tuple[str, ...] = ()
    traces: tuple[str, ...] = ()
    format: str = ""
    thinking: bool = False
    samples: Size = 32
    on_policy: Share = 1.0
    beta: Share = 1.0
    temperature: Positive = 1.0
    max_tokens: Size = 512
    tokens_at_once: Size = 262144
    micro_batch_tokens: Size = 16384

    def check(self) -> None:
        if self.length.unit != "steps":
            raise UserError(f'length must be in steps ("650 steps"), not {self.length}')
        if any(phase.until.unit == "tokens" for phase in self.optim.schedule):
            raise UserError("optim.schedule must be in steps or percent, not tokens")


@dataclass(frozen=True)
class LogitsConfig(StudentConfig):
    """Traces, and at each of their tokens the `k` likeliest ones of the teacher: cross-entropy + kl_weight * KL.

    ce_weight, kl_weight: of the two losses. store: keep the teacher's probabilities in run_dir/top_k, so that the
    teacher is asked once however many epochs follow; else it is asked at every step.
    data, batch, epochs, steps: as of fine-tuning (`samples`, not `tokens`).
    """

    fixed: ClassVar[tuple[str, ...]] = (
        *("model", "fresh", "teacher", "k", "ce_weight", "kl_weight", "batch.samples", "batch.normalise"),
        *("seed", "precision", "ema_decay", "optim.bf16_moments"),
    )

    run_dir: str = "runs/logits"
    epochs: Positive = 2.0
    steps: Count = 0
    k: Size = 32
    ce_weight: NonNegative = 1.0
    kl_weight: NonNegative = 1.0
    store: bool = True
    data: SftDataSection = field(default_factory=SftDataSection)
    batch: SftBatchSection = field(default_factory=SftBatchSection)

    def check(self) -> None:
        if not self.ce_weight and not self.kl_weight:
            raise UserError("ce_weight and kl_weight are both 0: nothing would be learnt")
        if not self.batch.samples:
            raise UserError("batch.tokens is of plain fine-tuning: set batch.samples")
        if any(phase.until.unit == "tokens" for phase in self.optim.schedule):
            raise UserError("optim.schedule must be in steps or percent, not tokens")
