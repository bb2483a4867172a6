"""How to choose tokens: what a request says, checked once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..errors import UserError

GuideKind = Literal["json_object", "json_schema", "regex", "grammar", "tools"]
MOST_BIAS = 100.0  # OpenAI's bound of logit_bias: it all but forbids, or forces, a token


@dataclass(frozen=True)
class Guide:
    """What a completion must look like; the engine lets no token through that breaks it.

    kind: "json_object"; "json_schema", "regex" or "grammar" (Lark), with the schema, pattern or grammar in `text`;
        "tools": one or more calls, in the markup of chat format `format`, of the functions in `tools`.
    tools: (name, JSON schema of its parameters) of every function that may be called.
    after_thinking: the model reasons first, freely, up to `</think>`; the guide holds from there.
    """

    kind: GuideKind
    text: str = ""
    tools: tuple[tuple[str, str], ...] = ()
    format: str = ""
    after_thinking: bool = False


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens.

    temperature: 0 takes the most likely token. top_k: 0 is off. top_p, min_p: of the distribution after temperature.
    seed: 64 bits; None draws one, which the completion reports. max_tokens: None fills the context.
    tempered_logprobs: report log-probabilities at this temperature instead of 1 (0 counts as 1).
    stop: strings that end the text (whoever shows it cuts them off); stop_token_ids: besides the model's own.
    presence_penalty, frequency_penalty: subtracted from the logit of a token that was generated before, once or as
        often as it was; repetition_penalty: divides positive logits of tokens that occur in prompt or text, and
        multiplies negative ones. logit_bias: token id -> what is added to its logit.
    top_logprobs: so many of the likeliest tokens are reported with each token. prompt_logprobs: the prompt's tokens are
        reported, too. guide: what the text must look like.

    Penalties and biases come before temperature; reported log-probabilities know nothing of them.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    tempered_logprobs: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    guide: Guide | None = None

    def __post_init__(self) -> None:
        checks = [
            (0 <= self.temperature < float("inf"), "temperature must be 0 or more"),
            (self.top_k >= 0, "top_k must be 0 (off) or more"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (0 <= self.min_p <= 1, "min_p must be between 0 and 1"),
            (self.max_tokens is None or self.max_tokens >= 1, "max_tokens must be 1 or more"),
            (self.seed is None or -(2**63) <= self.seed < 2**63, "seed must fit in 64 bits"),
            (not isinstance(self.stop, str), "stop must be a sequence of strings, not one string"),
            (all(self.stop), "a stop string must not be empty"),
            (-2 <= self.presence_penalty <= 2, "presence_penalty must be between -2 and 2"),
            (-2 <= self.frequency_penalty <= 2, "frequency_penalty must be between -2 and 2"),
            (0 < self.repetition_penalty < float("inf"), "repetition_penalty must be above 0"),
            (
                all(-MOST_BIAS <= bias <= MOST_BIAS for bias in self.logit_bias.values()),
                f"values of logit_bias must be between -{MOST_BIAS:.0f} and {MOST_BIAS:.0f}",
            ),
            (self.top_logprobs >= 0, "top_logprobs must be 0 or more"),
        ]
        for holds, text in checks:
            if not holds:
                raise UserError(f"sampling: {text}")

    @property
    def penalized(self) -> bool:
        """Do the logits of a token depend on those chosen before?"""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0

    @property
    def beyond_plain_sampling(self) -> str:
        """The first option that only the engine knows, or ""."""
        asked = {
            "a penalty": self.penalized,
            "logit_bias": self.logit_bias,
            "top_logprobs": self.top_logprobs,
            "prompt_logprobs": self.prompt_logprobs,
            "a guide": self.guide is not None,
        }
        return next((name for name, given in asked.items() if given), "")
