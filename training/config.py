"""The settings of a pre-training run.

A run is one TOML file (examples in training/configs/pretrain) plus `key=value` overrides. The resolved settings are
saved with the run and in every checkpoint. Paths are relative to the working directory.
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from ..core.config import ModelConfig, Yarn
from ..errors import UserError
from .settings import Count, NonNegative, Positive, Range, Section, Share, Size, Span

Beta = Annotated[float, Range(0, 0.999999)]

START, THOUSAND, END = Span(0, "steps"), Span(1000, "steps"), Span(100, "percent")


@dataclass(frozen=True)
class ModelSection(Section):
    """The model's shape: a preset or a directory with a config.json as `base`, and any field of config.json on top.

    Without a base the fields must be complete. `q_lora_rank = 0` means no query compression and
    `rope_scaling = { type = "default" }` no YaRN (TOML has no null).
    """

    extra: ClassVar[str | None] = "fields"

    base: str = ""
    fields: dict[str, Any] = field(default_factory=dict)

    def resolve(self) -> ModelConfig:
        fields = dict(self.fields)
        known = [item.name for item in dataclasses.fields(ModelConfig)]
        for name in fields:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                raise UserError(
                    f"unknown key model.{name}; "
                    + (f"did you mean model.{close[0]}?" if close else "it is no field of a model's config.json")
                )
        if "q_lora_rank" in fields:
            fields["q_lora_rank"] = fields["q_lora_rank"] or None
        if not self.base:
            return ModelConfig.from_dict(fields)
        if "rope_scaling" in fields:
            fields["rope_scaling"] = Yarn.from_dict(fields["rope_scaling"])
        return ModelConfig.from_pretrained(self.base).replace(**fields)


@dataclass(frozen=True)
class DataSection(Section):
    """Prepared shard directories with integer weights (share of sequences), and how sequences are made from them."""

    sources: dict[str, Size] = field(default_factory=dict)  # directory -> weight
    validation: dict[str, str] = field(default_factory=dict)  # name in the log -> directory
    seq_len: Size = 4096  # tokens
    fim_rate: Share = 0.1  # of documents, PSM order (report, section 4.1)
    split_rate: Share = 0.0  # of tokens that combine punctuation and line breaks; the report gives no number
    cross_document_attention: bool = True  # as published: packed documents see each other


@dataclass(frozen=True)
class Phase(Section):
    """One stretch of the learning rate, from where the previous one ended `until` a point of the run."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    until: Span = END
    lr: Annotated[float, Range(0)] | None = None  # at the end; default: unchanged when constant, else optim.final_lr


@dataclass(frozen=True)
class OptimSection(Section):
    """AdamW and its learning rate: linear warm-up to `lr`, then the phases of `schedule`; the last value holds."""

    lr: Positive = 2.2e-4
    final_lr: NonNegative = 0.0
    warmup_steps: Count = 0
    schedule: tuple[Phase, ...] = ()
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    grad_clip: NonNegative = 1.0  # global norm; 0 = off
    bf16_moments: bool = False


@dataclass(frozen=True)
class Ramp(Section):
    """Batch-size ramp: linear in the unit of `over`, from `start` to batch.sequences, rounded down to `multiple`."""

    start: Size = 1
    over: Span = START
    multiple: Size = 1

    def check(self) -> None:
        if self.over.unit == "percent":  # a longer run would then have other batches from its start
            raise UserError(f'over must be in steps or tokens ("469B tokens"), not {self.over}')


@dataclass(frozen=True)
class BatchSection(Section):
    """Sequences per optimizer step over all processes, and per forward pass of one process (`micro_batch`)."""

    sequences: Size = 16
    micro_batch: Size = 16
    ramp: Ramp | None = None

    def check(self) -> None:
        if self.ramp and self.ramp.start > self.sequences:
            raise UserError(f"ramp.start must be at most batch.sequences ({self.sequences}), not {self.ramp.start}")


@dataclass(frozen=True)
class BalanceSection(Section):
    """Expert load: bias step gamma (0 after `gamma_until`) and weight alpha of the sequence-wise balance loss.

    centred: subtract the mean of the bias steps over a layer's experts, as in Moonlight.
    """

    gamma: NonNegative = 1e-3
    gamma_until: Span = END
    alpha: NonNegative = 1e-4
    centred: bool = False


@dataclass(frozen=True)
class MtpSection(Section):
    """Weight of the multi-token-prediction loss (lambda): `weight`, then `final_weight` from `switch_at`."""

    weight: NonNegative = 0.3
    final_weight: NonNegative = 0.1
    switch_at: Span = END


@dataclass(frozen=True)
class EvalSection(Section):
    """Validation every `every` steps (0 = never) on `batches` micro-batches of each validation set."""

    every: Count = 0
    batches: Size = 8


@dataclass(frozen=True)
class SampleSection(Section):
    """Text continued from `prompts` every `every` steps (0 = never), `max_tokens` tokens each."""

    every: Count = 0
    prompts: tuple[str, ...] = ()
    max_tokens: Size = 64
    temperature: NonNegative = 0.8


@dataclass(frozen=True)
class CheckpointSection(Section):
    """A checkpoint every `every` steps (0 = only at the end and on a signal); the newest `keep` stay."""

    every: Count = 1000
    keep: Size = 3


@dataclass(frozen=True)
class LogSection(Section):
    """A record in metrics.jsonl every `every` steps."""

    every: Size = 1
    tensorboard: bool = False


@dataclass(frozen=True)
class RunConfig(Section):
    """What every training run has. Everything it leaves lies under `run_dir`.

    fixed: what the numbers of a run hang on from its first step: a checkpoint resumes only under the same values.
    """

    fixed: ClassVar[tuple[str, ...]] = ()

    run_dir: str = "runs/train"
    seed: Count = 0
    precision: Literal["fp32", "bf16"] = "fp32"  # of parameters and arithmetic; bf16 keeps float32 master weights
    recompute: Literal["none", "full"] = "none"
    ema_decay: Annotated[float, Range(0, 0.9999999)] = 0.0  # per step; 0 = no average of the weights is kept
    max_skipped_steps: Count = 20  # steps with a non-finite loss or gradient in a row before the run stops
    optim: OptimSection = OptimSection()
    balance: BalanceSection = BalanceSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    def fingerprint(self) -> str:
        """sha256 of the resolved settings."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """A pre-training run. `length` is its end, in steps or tokens."""

    fixed = ("model", "tokenizer", "data", "batch", "seed", "precision", "ema_decay", "optim.bf16_moments")

    run_dir: str = "runs/pretrain"
    length: Span = THOUSAND
    tokenizer: str = ""  # directory with a tokenizer.json
    init_std: Positive = 0.006  # report, section 4.2
    embedding_std: Annotated[float, Range(0, open=True)] | None = None  # default: init_std
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    batch: BatchSection = BatchSection()
    mtp: MtpSection = MtpSection()
    eval: EvalSection = EvalSection()
    sample: SampleSection = SampleSection()

    def check(self) -> None:
        if self.length.unit == "percent":
            raise UserError(f'length must be in steps or tokens ("150 steps", "10B tokens"), not {self.length}')


def check_resume(saved: Mapping[str, Any], current: RunConfig) -> list[str]:
    """Can a run saved with settings `saved` (a `to_dict`) go on under `current`?

    UserError where a key of `fixed` differs; else the dotted keys that changed, for a note to the user.
    """
    old, new = _flat(saved), _flat(current.to_dict())
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    for key in changed:
        if any(key == fixed or key.startswith(fixed + ".") for fixed in current.fixed):
            raise UserError(
                f"this run was started with {key} = {old.get(key)!r}, the settings now say {new.get(key)!r}: "
                "put it back, or give the new run another run_dir"
            )
    return changed


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat
