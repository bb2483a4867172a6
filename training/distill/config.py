"""The settings of distillation: where samples come from, which are kept, and what the student does with them."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from ...core.encoding import FORMATS
from ...core.generate import SamplingParams
from ...errors import UserError
from ..grpo.config import PLAIN_TEMPLATE
from ..rewards.registry import RewardSection
from ..settings import Count, NonNegative, Positive, Range, Section, Share, Size
from ..sft.config import SftConfig
from .student_config import LogitsConfig, OnPolicyConfig


@dataclass(frozen=True)
class TeacherSection(Section):
    """Who is asked: `model`, a directory of ours, or the model `served_model` of the server at `endpoint`.

    format: a chat format, "r1-zero" for the plain template of DeepSeek-R1-Zero, or "" for that of the model's
        tokenizer. thinking: for formats with a switch (v3.1). batch: conversations that a local model answers at a
        time. precision: of a local model's weights; "" keeps the checkpoint's.
    api_key_env: environment variable with the key of the endpoint. timeout: seconds of one request. retries: of one
        request. concurrency: requests at a time. body: further fields of each request.
    """

    model: str = ""
    endpoint: str = ""
    served_model: str = ""
    format: str = ""
    thinking: bool = False
    batch: Size = 64
    precision: Literal["", "fp32", "bf16"] = ""
    api_key_env: str = ""
    timeout: Positive = 1800.0
    retries: Count = 6
    concurrency: Size = 32
    body: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        if self.model and self.endpoint:
            raise UserError("model and endpoint exclude each other: one teacher is asked")
        if self.endpoint and not self.served_model:
            raise UserError("served_model must name the model that endpoint serves")
        if self.format not in ("", PLAIN_TEMPLATE, *FORMATS):
            raise UserError(f"format must be one of {', '.join((*FORMATS, PLAIN_TEMPLATE))}, not {self.format!r}")


@dataclass(frozen=True)
class SamplingSection(Section):
    """How replies are drawn: `samples` of each prompt, with the temperature that the R1 report recommends.

    system: a system message before every prompt, not kept in the traces.
    """

    samples: Size = 4
    temperature: NonNegative = 0.6
    top_p: Annotated[float, Range(0, 1, open=True)] = 0.95
    top_k: Count = 0
    min_p: Share = 0.0
    max_tokens: Size = 32768
    system: str = ""

    def params(self, seed: int) -> SamplingParams:
        return SamplingParams(
            self.temperature, self.top_k, self.top_p, self.min_p, seed=seed, max_tokens=self.max_tokens
        )


@dataclass(frozen=True)
class FilterSection(Section):
    """Which samples become traces. 0 and "" turn a rule off.

    minimum: least value of a reward, by its name; those whose name begins with "accuracy" need 1 unless named here.
        Where none of these could tell, `judge` decides, if it is named here.
    unverified: what becomes of samples that nobody could judge, where there is an accuracy reward in the settings.
    style: "r1": one thought, not empty, and an answer behind it; "r1-zero": with <answer> tags; "any".
    language: least share of words in the prompt's language (the row's `language`, or the prompt's own script) in the
        thought, judged where there are at least `language_words` words. max_tokens: of the reply. max_paragraph:
        characters of the thought's longest paragraph. code_blocks: may a thought hold fenced code?
    repeat_ngram, repeat_limit: a text in which some run of so many words occurs more often than that is a loop.
    near_duplicate: replies to one prompt whose 5-grams overlap (Jaccard) by so much count as one.
    per_prompt: traces of one prompt at most.
    benchmarks: files, or folders of them, whose items must not be learnt: JSON lines and parquet (every text in a
        row) or plain text, an item a line.
        Prompts and replies that share a run of `contamination_ngram` words with them are left out.
    pass_rate: prompts whose share of right samples lies in it, borders included, are fit for reinforcement learning.
    """

    minimum: dict[str, float] = field(default_factory=dict)
    unverified: Literal["reject", "keep"] = "reject"
    style: Literal["r1", "r1-zero", "any"] = "r1"
    language: Share = 0.0
    language_words: NonNegative = 8.0
    max_tokens: Count = 0
    max_paragraph: Count = 0
    code_blocks: bool = True
    repeat_ngram: Size = 16
    repeat_limit: Count = 4
    near_duplicate: Share = 0.0
    per_prompt: Count = 0
    benchmarks: tuple[str, ...] = ()
    contamination_ngram: Size = 13
    pass_rate: tuple[Share, Share] = (0.1, 0.9)


@dataclass(frozen=True)
class PromptsSection(Section):
    """prompts: files of JSON lines with `prompt` (text or messages) and columns that rewards read; limit: of them,
    0 = all. conversations: files that the student learns beside the traces, such as what no rule can verify."""

    prompts: tuple[str, ...] = ()
    limit: Count = 0
    conversations: tuple[str, ...] = ()


@dataclass(frozen=True)
class DistillConfig(Section):
    """A distillation. Everything that it leaves lies under `run_dir`.

    stages: what the student does with the traces, in this order; none leaves the traces alone.
    reward_timeout: seconds that the rewards may take over a batch of samples.
    student: plain fine-tuning on the traces ("sft"), the way of R1's distilled models. logits: cross-entropy plus the
        teacher's top probabilities. onpolicy: the student writes, the teacher gives its probabilities. What belongs to
        this run in these three (run_dir, traces, prompts, the teacher, the model of the stage before) is filled in
        where it is left empty.
    """

    run_dir: str = "runs/distill"
    seed: Count = 0
    stages: tuple[Literal["sft", "logits", "onpolicy"], ...] = ("sft",)
    reward_timeout: Positive = 600.0
    rewards: tuple[RewardSection, ...] = ()
    data: PromptsSection = PromptsSection()
    teacher: TeacherSection = TeacherSection()
    sampling: SamplingSection = SamplingSection()
    filter: FilterSection = FilterSection()
    student: SftConfig = field(default_factory=SftConfig)
    logits: LogitsConfig = field(default_factory=LogitsConfig)
    onpolicy: OnPolicyConfig = field(default_factory=OnPolicyConfig)

    def check(self) -> None:
        if len(set(self.stages)) < len(self.stages):
            raise UserError("stages names one twice")
