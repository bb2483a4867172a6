"""The settings of a run of GRPO.

A *step* of the run is one rollout and all updates made from it: `prompts_per_step` prompts get `group_size` completions
each; these are split at random into `mini_batches`, one update each, `inner_epochs` times over. Papers that count
updates have that many times more steps.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from ...errors import UserError
from ..config import START, THOUSAND, BalanceSection, Beta, OptimSection, RunConfig
from ..rewards.registry import RewardSection
from ..settings import Count, NonNegative, Positive, Range, Section, Share, Size, Span

PLAIN_TEMPLATE = "r1-zero"  # the value of data.format that is no chat format


@dataclass(frozen=True)
class PromptSection(Section):
    """JSON lines with `prompt` (text, or messages in OpenAI's form) and columns that rewards read (`answer`, ...).

    format: a chat format, "r1-zero" for the plain template of DeepSeek-R1-Zero (R1 report, table 1), or "" for the chat
    format of the model's tokenizer. thinking: for formats with a switch (v3.1).
    """

    prompts: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    format: str = ""
    thinking: bool = False


@dataclass(frozen=True)
class Longer(Section):
    """From the step `at` on, completions may have `max_tokens` tokens."""

    at: Span = START
    max_tokens: Size = 1024


@dataclass(frozen=True)
class RolloutSection(Section):
    """How completions are drawn.

    max_tokens: what the model may write in answer to a prompt, over all turns. top_p below 1 makes the policy that is
    trained (everything) another one than the policy that wrote (the nucleus). tokens_at_once: prompts and room for
    completions of the sequences that one process generates together.
    """

    temperature: Positive = 1.0
    top_p: Annotated[float, Range(0, 1, open=True)] = 1.0
    max_tokens: Size = 512
    longer: tuple[Longer, ...] = ()
    tokens_at_once: Size = 262144


@dataclass(frozen=True)
class EnvironmentSection(Section):
    """What answers the model. Nothing by default: one turn.

    tools: python functions "module:function" that the model may call. factory: "module:function" that makes an
    Environment (see environment.py) for every completion. max_turns: replies of the model. tool_timeout: seconds of a
    tool, after which the model is told so; timeout: of an environment, after which the run ends.
    """

    tools: tuple[str, ...] = ()
    factory: str = ""
    max_turns: Size = 8
    tool_timeout: Positive = 10.0
    timeout: Positive = 600.0

    def check(self) -> None:
        if self.tools and self.factory:
            raise UserError("tools and factory exclude each other: an environment of your own brings its own tools")


@dataclass(frozen=True)
class DynamicSamplingSection(Section):
    """Go on to other prompts until the step has `prompts_per_step` groups with unequal rewards (DAPO, section 3.2).

    rounds: of rollouts in one step at most; 0 is off: groups without a signal stay in the batch. over_sampling: prompts
    asked in a round over the groups that are missing.
    """

    rounds: Count = 0
    over_sampling: Annotated[float, Range(1)] = 1.0


@dataclass(frozen=True)
class CorrectionSection(Section):
    """Importance weights pi_trainer / pi_rollout, for rollouts whose arithmetic differs from the trainer's.

    level: one weight per token, or per sequence (the product). mode: weights above `cap` are cut to it, or the token
    (the sequence) is left out.
    """

    level: Literal["none", "token", "sequence"] = "none"
    mode: Literal["truncate", "mask"] = "truncate"
    cap: Positive = 2.0


@dataclass(frozen=True)
class LossSection(Section):
    """What an update minimises; see loss.py.

    delta: a second bound of the ratio from above, for tokens with negative advantage; above 1 + epsilon_high.
    beta: weight of the KL term; 0 loads no reference model. kl: its estimator. unbiased_kl: times pi / pi_old
    (DeepSeek-V3.2). mask_truncated: completions that hit the limit of tokens do not train.
    """

    kind: Literal["grpo", "dapo", "dr_grpo", "gspo"] = "grpo"
    epsilon_low: Positive = 0.2
    epsilon_high: Positive = 0.2
    delta: Positive | None = None
    beta: NonNegative = 0.0
    kl: Literal["k1", "k2", "k3"] = "k3"
    unbiased_kl: bool = False
    entropy_coef: NonNegative = 0.0
    mask_truncated: bool = False
    is_correction: CorrectionSection = CorrectionSection()

    def check(self) -> None:
        if self.delta is not None and self.delta <= 1 + self.epsilon_high:
            raise UserError(f"delta must be above 1 + epsilon_high ({1 + self.epsilon_high:g}), not {self.delta:g}")


@dataclass(frozen=True)
class ValidationSection(Section):
    """Greedy completions of up to `prompts` held-out prompts before the first step, every `every` steps (0 = never)
    and behind the last one."""

    every: Count = 0
    prompts: Size = 256


@dataclass(frozen=True)
class GrpoOptim(OptimSection):
    """AdamW for small steps: no weight decay."""

    lr: Positive = 1e-6
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: NonNegative = 0.0


@dataclass(frozen=True)
class GrpoBalance(BalanceSection):
    """The balancing biases stay as they are unless gamma is set: they shape which experts the policy uses."""

    gamma: NonNegative = 0.0
    alpha: NonNegative = 0.0


@dataclass(frozen=True)
class GrpoConfig(RunConfig):
    """A run of GRPO from the model in the directory `model`.

    scale_rewards: advantages are divided by the standard deviation of rewards in the group, over the step, or not.
    replay: which experts the update uses: those that the gates choose now (none), those that the rollout recorded
    (rollout; "R3") or those of the pass that computed the old log-probabilities (old; "R2"). Gate values are always
    computed anew. reference_reset: steps after which the reference of the KL term becomes the policy; 0 = never.
    log_completions: prompts of each step whose completions are kept in completions.jsonl.
    """

    fixed: ClassVar[tuple[str, ...]] = (
        *("model", "data", "group_size", "seed", "precision", "ema_decay", "optim.bf16_moments", "reference_reset"),
    )

    run_dir: str = "runs/grpo"
    length: Span = THOUSAND
    model: str = ""
    group_size: Annotated[int, Range(2)] = 8
    prompts_per_step: Size = 32
    mini_batches: Size = 1
    inner_epochs: Size = 1
    micro_batch_tokens: Size = 16384
    scale_rewards: Literal["group", "batch", "none"] = "group"
    replay: Literal["none", "rollout", "old"] = "none"
    reference_reset: Count = 0
    log_completions: Count = 1
    truncation_warning: Share = 0.1  # share of truncated completions above which the run says so
    rewards: tuple[RewardSection, ...] = ()
    data: PromptSection = PromptSection()
    rollout: RolloutSection = RolloutSection()
    environment: EnvironmentSection = EnvironmentSection()
    dynamic_sampling: DynamicSamplingSection = DynamicSamplingSection()
    loss: LossSection = LossSection()
    eval: ValidationSection = ValidationSection()
    optim: GrpoOptim = GrpoOptim()
    balance: GrpoBalance = GrpoBalance()

    def check(self) -> None:
        spans = [("length", self.length)]
        spans += [(f"optim.schedule[{i}].until", phase.until) for i, phase in enumerate(self.optim.schedule)]
        spans += [(f"rollout.longer[{i}].at", longer.at) for i, longer in enumerate(self.rollout.longer)]
        for name, span in spans:
            if span.unit == "tokens" or (name == "length" and span.unit == "percent"):
                raise UserError(f'{name} must be in steps ("650 steps"), not {span}')
        if self.mini_batches > self.prompts_per_step * self.group_size:
            raise UserError(f"mini_batches must be at most prompts_per_step x group_size, not {self.mini_batches}")
        if self.reference_reset and not self.loss.beta:
            raise UserError("reference_reset needs a reference: set loss.beta, or leave it 0")

    @property
    def updates_per_step(self) -> int:
        return self.mini_batches * self.inner_epochs
