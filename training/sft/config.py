"""The settings of a run of supervised fine-tuning."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ...errors import UserError
from ..config import END, BalanceSection, ModelSection, OptimSection, Phase, RunConfig
from ..data.sources import check_name
from ..lora import LoraSection
from ..settings import Count, NonNegative, Positive, Range, Section, Size

HELD_OUT = "held-out"  # validation/NAME of the rows that data.held_out sets aside


@dataclass(frozen=True)
class SftDataSection(Section):
    """Conversations, and what is learnt of them (see training/chat_data.py for the forms of a row).

    train: files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet), or folders of such files. validation: name in the log ->
    file or folder. held_out: share of the conversations of `train` that are set aside and validated on.
    format: the chat format; auto takes that of the model's tokenizer. A student that runs through transformers has its
    tokenizer's own template, always. thinking_in_loss: are thoughts learnt, or answers alone?
    seq_len: tokens of the longest sample. overlong: what becomes of longer ones; either way they are counted.
    """

    train: tuple[str, ...] = ()
    validation: dict[str, str] = field(default_factory=dict)
    held_out: Annotated[float, Range(0, 0.5)] = 0.0
    format: Literal["auto", "v3", "r1", "v3.1", "kimi-k2", "moonlight"] = "auto"
    thinking_in_loss: bool = True
    seq_len: Size = 4096
    overlong: Literal["drop", "cut"] = "drop"

    def check(self) -> None:
        for name in self.validation:
            check_name(name)
            if name in ("train", HELD_OUT):
                raise UserError(f"validation.{name}: this name is taken, choose another one")


@dataclass(frozen=True)
class SftBatchSection(Section):
    """What an optimizer step learns from, over all processes: `samples` of them or, in their place, `tokens`.

    samples: a forward pass takes as many of a process's samples, of like length, as fit in `micro_tokens`; one at
    least.
    tokens: a multiple of data.seq_len. Samples are packed into rows of seq_len tokens, best fit first; a row is a
    forward pass. However they are packed, no sample sees another one.
    normalise: the loss is a mean over the tokens of the global batch, or over its samples of their own means.
    """

    samples: Count = 64
    tokens: Count = 0
    micro_tokens: Size = 16384
    normalise: Literal["tokens", "samples"] = "tokens"

    def check(self) -> None:
        if bool(self.samples) == bool(self.tokens):
            raise UserError("samples and tokens exclude each other: set one of them, and the other one to 0")


@dataclass(frozen=True)
class SftEvalSection(Section):
    """The loss on the validation sets after the first step, every `every` steps (0 = no further) and at the end."""

    every: Count = 0


@dataclass(frozen=True)
class FreshSection(ModelSection):
    """The shape of a model that starts from random weights, of deviation `init_std`, in the embedding `embedding_std`
    (default: init_std). Without `base` and fields of config.json there is none."""

    init_std: Positive = 0.006
    embedding_std: Annotated[float, Range(0, open=True)] | None = None

    @property
    def wanted(self) -> bool:
        return bool(self.base or self.fields)


@dataclass(frozen=True)
class SftOptim(OptimSection):
    """Of DeepSeek-V3's fine-tuning (report, section 5.1), which has no word on the rest of the optimizer."""

    lr: Positive = 5e-6
    schedule: tuple[Phase, ...] = (Phase("cosine", END, 1e-6),)


@dataclass(frozen=True)
class SftBalance(BalanceSection):
    """Experts are balanced when a model comes here: neither biases nor a loss push them any further."""

    gamma: NonNegative = 0.0
    alpha: NonNegative = 0.0


@dataclass(frozen=True)
class SftConfig(RunConfig):
    """A run of supervised fine-tuning.

    model: directory in the Hugging Face format to start from, of the DeepSeek-V3 family or of another one that
    transformers runs. fresh: or a model of the family from random weights, with the tokenizer of the directory
    `tokenizer`. epochs: passes over the samples, to the nearest step. steps: the length in steps instead, if not 0.
    mtp_weight: of the multi-token-prediction loss; at 0, MTP modules stay as they are.
    """

    fixed = (
        "seed", "precision", "ema_decay", "optim.bf16_moments", "batch.samples", "batch.tokens", "batch.normalise",
        "mtp_weight", "lora.rank", "lora.alpha", "lora.targets",
    )  # fmt: skip

    run_dir: str = "runs/sft"
    model: str = ""
    fresh: FreshSection = FreshSection()
    tokenizer: str = ""
    epochs: Positive = 2.0
    steps: Count = 0
    mtp_weight: NonNegative = 0.0
    data: SftDataSection = SftDataSection()
    batch: SftBatchSection = SftBatchSection()
    optim: SftOptim = SftOptim()
    balance: SftBalance = SftBalance()
    eval: SftEvalSection = SftEvalSection()
    lora: LoraSection = field(default_factory=LoraSection)

    def check(self) -> None:
        if self.batch.tokens % self.data.seq_len:
            raise UserError(
                f"batch.tokens must be a multiple of data.seq_len ({self.data.seq_len}): rows are that long"
            )
        for number, phase in enumerate(self.optim.schedule):
            if phase.until.unit == "tokens":
                raise UserError(f"optim.schedule[{number}].until must be in steps or percent, not {phase.until}")
        if self.lora.rank and self.balance.gamma:
            raise UserError("balance.gamma moves the biases of the gates, which an adapter does not hold: set it to 0")
