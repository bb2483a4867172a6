"""`dsv3 quickstart`: the whole way at laptop size, from the files of this machine to a model that reasons.

    OUT/tokenizer, OUT/data     a byte-level BPE learnt from text and code found here; these as tokens
    OUT/pretrain                the base model's run (settings beside it: OUT/pretrain.toml)
    OUT/tasks                   a task to reason about: prompts, cold-start traces, held-out problems
    OUT/zero sft grpo           reinforcement of the base model itself; cold start; reinforcement
    OUT/student baseline        a smaller model taught by the replies of the one before, and the same without a teacher
    OUT/measured                what each of them can do with the held-out problems
    OUT/evaluation              the report of `dsv3 eval` on the model after GRPO
    OUT/model                   the model after GRPO in the Hugging Face format
    OUT/report.html .json .png  what came out

Each of these is made by a stage that is skipped where its result is there, and each appears as a whole or not at all,
so a run that was interrupted goes on where it was, and one that is finished does nothing.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..core.files import atomic_directory, atomic_write
from ..errors import UserError
from ..ops.op import activate_backend
from ..training.config import PretrainConfig
from ..training.data.corpus import machine_sources
from ..training.data.shards import TokenSet
from ..training.grpo.config import GrpoConfig
from ..training.launch import ProcessFailed, processes_for_this_machine
from ..training.loop import METRICS
from ..training.metrics import read_metrics
from ..training.plots import draw
from ..training.progress import Progress
from ..training.verbs import SHIPPED
from .base import BaseModel, Sources
from .folder import Folder, exceptions_for_signals
from .page import write_page
from .picture import draw_summary
from .reasoning import Reasoning
from .report import build_report, report_lines
from .workshop import Train, Workshop, one_thread, train_in_processes

SETTINGS = SHIPPED / "pretrain" / "quickstart.toml"
INTERRUPTED = 130

# Seconds that the stages took on the machine of docs/quickstart.md: their proportions tell the time that is left.
USUAL = {
    "find": 6, "tokenizer": 2, "data": 4, "pretrain": 115, "tasks": 1, "zero": 10, "sft": 75, "grpo": 100,
    "distill": 65, "baseline": 40, "measure": 12, "evaluate": 5, "model": 1, "report": 5,
}  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """What the command line calls."""
    try:
        with exceptions_for_signals():
            report = quickstart(args.out, seed=args.seed, processes=args.processes, backend=args.backend)
    except ProcessFailed as failure:
        return failure.code
    except KeyboardInterrupt:
        print("dsv3: interrupted; run the same command to go on", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(report, indent=2) if args.json else "\n".join(report_lines(report, args.out)))
    return 0


def quickstart(
    out: str | Path,
    *,
    seed: int | None = None,
    processes: int | None = None,
    backend: str = "auto",
    overrides: Mapping[str, Sequence[str]] | None = None,
    sources: Sources = machine_sources,
    train: Train = train_in_processes,
) -> dict[str, Any]:
    """Do what is not done yet in `out`, and return the report.

    seed: of all of it; None: the shipped settings'. processes: data-parallel ones; None: as many as serve this machine.
    overrides: kind of training -> `key=value` over its shipped settings. sources: where the text comes from.
    train: runs a settings file. Raises UserError for a folder that holds something else, a full disk, and a base model
    that has not learnt.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("quickstart draws pictures with matplotlib: pip install 'dsv3[train]'")
    if processes is not None and processes < 1:
        raise UserError(f"--processes must be 1 or more, not {processes}")
    seed = PretrainConfig.load(SETTINGS).seed if seed is None else seed
    device = activate_backend(backend).device
    processes = processes or (processes_for_this_machine() if device == "cpu" else 1)
    progress = Progress()
    with Folder(Path(out).absolute(), seed, progress.say) as folder:
        workshop = Workshop(folder, progress, seed, processes, backend, train, overrides or {})
        return Quickstart(workshop, sources).run()


class Quickstart:
    """The stages in their order."""

    def __init__(self, workshop: Workshop, sources: Sources) -> None:
        self.workshop, self.folder, self.progress = workshop, workshop.folder, workshop.progress
        self.out = workshop.out
        self.base, self.reasoning = BaseModel(workshop, sources), Reasoning(workshop)
        self._done: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        base, reasoning = self.base, self.reasoning
        tokenizer, data = self.out / "tokenizer", self.out / "data"
        with self.progress:
            self._stage("find", base.find, tokenizer, data)
            self._stage("tokenizer", base.tokenizer, tokenizer)
            self._stage("data", base.data, data)
        self._stage("pretrain", base.pretrain, reasoning.model("pretrain"))
        base.check()
        self._stage("tasks", reasoning.tasks, reasoning.tasks_folder)
        # Runs of training have a live line of their own.
        for name in ("zero", "sft", "grpo"):
            self._stage(name, getattr(reasoning, name), reasoning.model(name))
        self._stage("distill", reasoning.distill, reasoning.model("student"))
        self._stage("baseline", reasoning.baseline, reasoning.model("baseline"))
        with self.progress, one_thread():
            for name in ("sft", "grpo", "student", "baseline"):
                self._stage("measure", partial(reasoning.measure, name), reasoning.measured(name))
            self._stage("evaluate", reasoning.evaluate, self.out / "evaluation" / "report.json")
            self._stage("model", self._model, self.out / "model")
            self._stage("report", self._report, self.out / "report.json")
        report: dict[str, Any] = json.loads((self.out / "report.json").read_text(encoding="utf-8"))
        return report

    def _stage(self, name: str, work: Callable[[], None], *results: Path) -> None:
        if not all(result.exists() for result in results):
            self._say_time_left(name)
            with self.folder.timed(name):
                work()

    def _say_time_left(self, name: str) -> None:
        """At the pace of the stages that are done, in proportion to what they usually take."""
        seconds = self.folder.facts["seconds"]
        names = list(USUAL)
        done = [stage for stage in names[: names.index(name)] if stage in seconds]
        left = float(sum(USUAL[stage] for stage in names[names.index(name) :]))
        if usual := sum(USUAL[stage] for stage in done):
            left *= sum(seconds[stage] for stage in done) / usual
        minutes, rest = divmod(round(left), 60)
        self.progress.say(
            f"--- {name} (stage {names.index(name) + 1} of {len(names)}, about {minutes}:{rest:02d} left)"
        )

    def _model(self) -> None:
        source = self.reasoning.model("grpo")
        files = sorted(source.iterdir())
        needed = sum(file.stat().st_size for file in files)
        with atomic_directory(self.out / "model", needed=needed) as target:
            for file in files:
                (target / file.name).write_bytes(file.read_bytes())

    def _report(self) -> None:
        self.progress.show("writing the report")
        config = self.base.config
        sets = [TokenSet.open(path, verify=False) for path in sorted(config.data.sources)]
        logs = {name: read_metrics(self.out / name / METRICS) for name in ("pretrain", "zero", "sft", "grpo")}
        measured = {
            name: json.loads(self.reasoning.measured(name).read_text(encoding="utf-8"))
            for name in ("sft", "grpo", "student", "baseline")
        }
        group_size = GrpoConfig.load(self.out / "zero.toml").group_size
        facts = self.folder.facts | {"processes": self.workshop.processes, "group_size": group_size}
        report = build_report(self.out, config, logs, measured, sets, facts)
        draw(logs["pretrain"], self.out)
        draw_summary(logs["pretrain"], logs["grpo"], report, self.out / "quickstart.png")
        write_page(report, logs, self.out)
        with atomic_write(self.out / "report.json", "w") as file:
            json.dump(report, file, indent=2, ensure_ascii=False)
