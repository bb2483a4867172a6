"""The settings of the R1 pipeline. A stage's own settings are those of the kind of training that it is."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ...errors import UserError
from ..distill.config import FilterSection, SamplingSection, TeacherSection
from ..grpo.config import GrpoConfig
from ..rewards.registry import RewardSection
from ..settings import Count, NonNegative, Positive, Range, Section, Size
from ..sft.config import SftConfig

StageName = Literal["zero", "cold_start", "dev1", "dev2", "rejection", "dev3", "r1", "students"]
STAGES: tuple[StageName, ...] = ("zero", "cold_start", "dev1", "dev2", "rejection", "dev3", "r1", "students")


@dataclass(frozen=True)
class DataSection(Section):
    """What the pipeline is given, as files.

    reasoning: prompts with what their rewards read (`answer`, `tests`, ...). general: prompts for the last stage, with
        rules that a program can check. cold_start: conversations with thoughts, for the first fine-tuning.
    non_reasoning: conversations for the second. probe: held-out prompts with `answer`, to measure reflection with.
    """

    reasoning: tuple[str, ...] = ()
    general: tuple[str, ...] = ()
    cold_start: tuple[str, ...] = ()
    non_reasoning: tuple[str, ...] = ()
    probe: tuple[str, ...] = ()


@dataclass(frozen=True)
class SamplesSection(Section):
    """Replies of a model to the reasoning prompts, of which the right and readable ones become data.

    limit: of prompts, 0 = all. batch: conversations at a time.
    """

    limit: Count = 0
    batch: Size = 64
    reward_timeout: Positive = 600.0
    rewards: tuple[RewardSection, ...] = ()
    sampling: SamplingSection = field(default_factory=SamplingSection)
    filter: FilterSection = field(default_factory=FilterSection)


@dataclass(frozen=True)
class ColdStartSection(SamplesSection):
    """Samples of R1-Zero as cold-start data, in readable form.

    minimum: traces that are wanted of them; where there are fewer, the run says so and goes on with data.cold_start.
    corrections: further traces, as a share of these, that begin with a wrong attempt, doubt it, and mend it.
    rewriter: a model that puts thoughts into readable prose, once more verified; without one, rules do it.
    """

    minimum: Count = 100
    corrections: Annotated[float, Range(0)] = 0.2
    rewriter: TeacherSection = field(default_factory=TeacherSection)
    rewriter_sampling: SamplingSection = field(default_factory=lambda: SamplingSection(samples=1))


@dataclass(frozen=True)
class ProbeSection(Section):
    """Reflection, measured before and after reinforcement on data.probe: `prompts` of them, `samples` replies each.

    judge: how a candidate answer is compared: as a number or text ("exact"), or as mathematics ("math").
    """

    prompts: Count = 200
    samples: Size = 1
    temperature: NonNegative = 0.6
    top_p: Annotated[float, Range(0, 1, open=True)] = 0.95
    max_tokens: Size = 4096
    judge: Literal["exact", "math"] = "exact"


@dataclass(frozen=True)
class R1Config(Section):
    """The pipeline. Everything that it leaves lies under `run_dir`, a folder for each of `stages`, which are

    zero: R1-Zero: GRPO on the base model, in the plain template, without any example
    cold_start: its right and readable samples as conversations
    dev1: fine-tuning of the base model on these and on data.cold_start
    dev2: GRPO for reasoning
    rejection: right samples of dev2
    dev3: fine-tuning of the base model on these and on data.non_reasoning
    r1: GRPO for all scenarios, its last `general_steps` steps with data.general
    students: fine-tuning of each of `students` on the data of dev3

    What a stage gets from the one before it (model, data, run_dir, format) is filled in; what its table sets itself
    stays. A fresh student has the tokenizer of the base. base: directory of the base model. format: of the chats, one
    that holds thoughts. processes: that a stage is run in, on this machine; 0 runs all of them in this very process (or
    these, under torchrun). general_rewards: in those last steps, in addition to those of `r1`: `constraints` by
    default, and `judge` where there is one.
    """

    run_dir: str = "runs/r1"
    seed: Count = 0
    base: str = ""
    format: Literal["r1", "v3.1"] = "r1"
    processes: Count = 0
    stages: tuple[StageName, ...] = STAGES
    data: DataSection = DataSection()
    zero: GrpoConfig = field(default_factory=GrpoConfig)
    cold_start: ColdStartSection = ColdStartSection()
    dev1: SftConfig = field(default_factory=SftConfig)
    dev2: GrpoConfig = field(default_factory=GrpoConfig)
    rejection: SamplesSection = SamplesSection()
    dev3: SftConfig = field(default_factory=SftConfig)
    r1: GrpoConfig = field(default_factory=GrpoConfig)
    general_steps: Count = 0
    general_rewards: tuple[RewardSection, ...] = (RewardSection("constraints"),)
    students: dict[str, SftConfig] = field(default_factory=dict)
    probe: ProbeSection = ProbeSection()

    def check(self) -> None:
        if list(self.stages) != [name for name in STAGES if name in self.stages]:
            raise UserError(f"stages must be some of {', '.join(STAGES)}, in this order")
        if self.general_steps and self.r1.length.value <= self.general_steps:
            raise UserError(
                f"general_steps must be below r1.length ({self.r1.length}), whose last ones they are, "
                f"not {self.general_steps}"
            )
        for name in self.students:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
                raise UserError(f"students.{name}: the name becomes a folder: use letters, digits, '.', '_' and '-'")
