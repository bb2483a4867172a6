"""The second half of a quickstart: from the base model to one that reasons, and to a smaller one that learnt from it.

tasks/      questions, cold-start traces, and held-out problems
zero/       GRPO on the base model itself, as R1-Zero; it finds nothing to reinforce at this size, and says so
sft/        cold start: both styles of traces
grpo/       reinforcement: right answers, form, and the language of the question
evaluation/ what `dsv3 eval` says of the model after reinforcement
student/    distillation: the teacher's verified replies, and a fresh, smaller model that learns from them
baseline/   the same fresh model on the cold-start traces: the student without a teacher
"""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ..core.files import atomic_directory, atomic_write
from ..evaluation.runner import Options
from ..evaluation.session import evaluate
from ..training.distill.config import DistillConfig
from ..training.grpo.config import GrpoConfig
from ..training.sft.config import SftConfig
from .arithmetic import Problem, cold_start, problems
from .measure import MAX_TOKENS, measure
from .report import machine
from .workshop import Workshop

TRACES = 20_000
PROMPTS = 8_000
MEASURED = 300  # held-out problems; the standard error of an accuracy is then 2.9 points at most


class Reasoning:
    """The stages."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop, self.out, self.progress = workshop, workshop.out, workshop.progress
        self.tasks_folder = self.out / "tasks"

    def model(self, name: str) -> Path:
        """The model that a stage made."""
        return self.out / name / "model"

    def held_out(self) -> list[Problem]:
        return problems(MEASURED, True, self.workshop.seed)

    def tasks(self) -> None:
        seed = self.workshop.seed
        with atomic_directory(self.tasks_folder) as target:
            write_rows(target / "cold_start.jsonl", cold_start(TRACES, seed))
            write_rows(target / "prompts.jsonl", [problem.row() for problem in problems(PROMPTS, False, seed)])
            write_rows(target / "held_out.jsonl", [problem.row() for problem in self.held_out()])

    def zero(self) -> None:
        self.progress.say("R1-Zero: reinforcement on the base model itself, with no example of a reply")
        self._grpo("zero", "quickstart-zero", self.model("pretrain"))

    def sft(self) -> None:
        self.progress.say(f"SFT: cold start on {TRACES:,} short traces")
        config = cast(SftConfig, self.workshop.settings("sft", "quickstart", seed=self.workshop.seed))
        data = replace(config.data, train=(str(self.tasks_folder / "cold_start.jsonl"),))
        model = str(self.model("pretrain"))
        self.workshop.run("sft", "sft", replace(config, run_dir=str(self.out / "sft"), model=model, data=data))

    def grpo(self) -> None:
        self.progress.say("GRPO: reinforcement by right answers, form and language")
        self._grpo("grpo", "quickstart", self.model("sft"))

    def distill(self) -> None:
        self.progress.say("distillation: the model writes, what is right and well formed teaches a smaller one")
        self.workshop.run("distill", "student", self._distillation())

    def baseline(self) -> None:
        self.progress.say("the same small model without a teacher, on the cold-start traces")
        student = self._distillation().student
        data = replace(student.data, train=(str(self.tasks_folder / "cold_start.jsonl"),))
        self.workshop.run("sft", "baseline", replace(student, run_dir=str(self.out / "baseline"), data=data))

    def _distillation(self) -> DistillConfig:
        config = cast(DistillConfig, self.workshop.settings("distill", "quickstart", seed=self.workshop.seed))
        return replace(
            config,
            run_dir=str(self.out / "student"),
            data=replace(config.data, prompts=(str(self.tasks_folder / "prompts.jsonl"),)),
            teacher=replace(config.teacher, model=str(self.model("grpo"))),
            student=replace(config.student, seed=self.workshop.seed, tokenizer=str(self.out / "tokenizer")),
        )

    def measure(self, name: str) -> None:
        self.progress.show(f"measuring {name} on {MEASURED} problems that nobody was trained on")
        found = measure(self.model(name), self.held_out(), self.workshop.seed)
        self.measured(name).parent.mkdir(exist_ok=True)
        with atomic_write(self.measured(name), "w") as file:
            json.dump(found, file, indent=1, ensure_ascii=False)
        score = found["greedy"]
        self.progress.say(
            f"{name}: {score['accuracy']:.1%} of {MEASURED} held-out problems right, {score['tokens']:.1f} tokens a "
            "reply" + (f", {share:.0%} Chinese" if (share := score["chinese_thoughts"]) is not None else "")
        )

    def evaluate(self) -> None:
        """The report that `dsv3 eval` writes, on the model that the person will talk to."""
        self.progress.show("evaluating the model as dsv3 eval does")
        folder = self.out / "evaluation"
        data = self.tasks_folder / "held_out.jsonl"
        model = self.model("grpo")
        shown = [shlex.quote(os.path.relpath(path)) for path in (model, data, folder)]
        evaluate(
            model,
            {"sums": data},
            Options(folder, seed=self.workshop.seed, max_tokens=MAX_TOKENS),
            self.progress,
            batch=MEASURED,
            reflection=True,
            machine=machine(),
            command=f"dsv3 eval {shown[0]} --tasks sums --data sums={shown[1]} --protocol greedy "
            f"--max-tokens {MAX_TOKENS} --seed {self.workshop.seed} --reflection --out {shown[2]}",
        )

    def measured(self, name: str) -> Path:
        return self.out / "measured" / f"{name}.json"

    def _grpo(self, name: str, shipped: str, model: Path) -> None:
        config = cast(GrpoConfig, self.workshop.settings("grpo", shipped, seed=self.workshop.seed))
        data = replace(config.data, prompts=(str(self.tasks_folder / "prompts.jsonl"),))
        config = replace(config, run_dir=str(self.out / name), model=str(model), data=data)
        self.workshop.run("grpo", name, config)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
