"""The R1 pipeline as a row of stages, each a folder of its own under RUN, skipped where its result is there.

    RUN/zero dev1 dev2 dev3 students/NAME   runs of training: checkpoints, log, model/
    RUN/cold_start rejection                samples, verdicts, and the conversations made of the good ones
    RUN/r1/reasoning general                the last reinforcement, before and with general data; RUN/r1/model
    RUN/probes/NAME                         reflection of a model
    RUN/*/settings.toml                     what each stage was run with
    RUN/r1.json                             seconds of each stage
    RUN/r1_report.json, r1_report.md        what came out

A stage that is interrupted goes on from its own checkpoint or samples. The V3 checkpoint that judges and rewrites in
the report is an endpoint here, where one is configured; preference models are not part of it: general prompts are
rewarded by rules.
"""

import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...core.completer import Completer
from ...core.files import atomic_write
from ...errors import UserError
from ...ops.op import activate_backend
from ...parallel.data import DataParallel
from ..chat_data import data_files
from ..config import RunConfig
from ..data.records import read_records
from ..distill.config import DistillConfig, PromptsSection
from ..distill.run import PATIENCE, distill, on_main, publish
from ..distill.teacher import open_completer
from ..distill.traces import REPORT as FILTER_REPORT
from ..distill.traces import TRACES
from ..grpo.config import PLAIN_TEMPLATE, GrpoConfig
from ..grpo.run import grpo
from ..launch import ProcessFailed, launch
from ..loop import METRICS
from ..metrics import read_metrics
from ..progress import Progress
from ..settings import Section, Span
from ..sft.config import SftConfig
from ..sft.run import sft
from ..sft.students import is_ours
from .checks import check
from .cold_start import REPORT as COLD_REPORT
from .cold_start import ROWS, ColdStart
from .config import R1Config, SamplesSection
from .probe import SWITCHED, measure, probe_settings, teacher_of
from .report import markdown

STATE, OUTCOME, READABLE = "r1.json", "r1_report.json", "r1_report.md"
RUNS: dict[str, Callable[[Any, str], Path | None]] = {"sft": sft, "grpo": grpo, "distill": distill}
LOGGED = ("loss", "reward", "reward_std", "completions/mean_length", "completions/clipped_ratio", "epoch", "kl")


class Stopped(Exception):
    """A stage was asked to end; its checkpoint is saved."""


def r1(config: R1Config, backend: str = "auto") -> Path | None:
    """Run, or go on with, the pipeline that `config` describes. Returns the directory of the last model, or None where
    a signal ended a stage early."""
    device = activate_backend(backend).device
    with DataParallel.start(device, PATIENCE) as parallel:
        try:
            return Pipeline(config, backend, parallel).run()
        except Stopped:
            return None
        except ProcessFailed as failure:  # which has said why
            raise SystemExit(failure.code) from None


class Pipeline:
    """The stages in their order."""

    def __init__(self, config: R1Config, backend: str, parallel: DataParallel) -> None:
        self.config, self.backend, self.parallel = config, backend, parallel
        self.root = Path(config.run_dir)
        self.report: dict[str, Any] = {"stages": {}, "reflection": {}}
        if config.processes and parallel.world_size > 1:
            raise UserError("processes is for a pipeline that is started alone: set it to 0 under torchrun")
        on_main(parallel, lambda: check(config))
        self.last: Path | None = None

    def run(self) -> Path | None:
        on_main(self.parallel, self._open)
        for name in self.config.stages:
            self._say(f"--- {name}")
            getattr(self, f"_{name}")()
            on_main(self.parallel, self._write_report)
        self._say(f"the pipeline is done; what came out is in {self.root / READABLE}")
        return self.last

    # The stages.

    def _zero(self) -> None:
        config = self.config
        base = Path(config.base)
        settings = self._grpo(config.zero, "zero", base, PLAIN_TEMPLATE, config.data.reasoning)
        self._train("grpo", "zero", settings)
        self._reflect("zero", PLAIN_TEMPLATE, base=base, zero=self._model("zero"))

    def _cold_start(self) -> None:
        config, folder = self.config, self.root / "cold_start"
        section = config.cold_start
        if not on_main(self.parallel, self._model("zero").exists):
            raise UserError(f"cold_start samples {self._model('zero')}, which is not there: do the stage zero first")
        if not (folder / COLD_REPORT).exists():
            filter = replace(section.filter, style="r1-zero")
            settings = self._samples(replace(section, filter=filter), "zero", PLAIN_TEMPLATE, folder / "samples")
            self._train("distill", "cold_start/samples", settings)
            on_main(self.parallel, lambda: self._make_readable(folder))
        report = self._read(folder / COLD_REPORT)
        report["given"] = on_main(self.parallel, lambda: count_rows(config.data.cold_start))
        report["samples"] = self._read(folder / "samples" / FILTER_REPORT)
        self._note("cold_start", report)
        if not report["from_zero"] + report["given"]:
            raise UserError(
                "R1-Zero gave no right and readable sample, and data.cold_start is empty: there is nothing to begin "
                "with; name conversations there"
            )

    def _make_readable(self, folder: Path) -> None:
        config, section = self.config, self.config.cold_start
        with Progress(self.parallel.is_main) as progress:
            work = ColdStart(section, folder, config.data.reasoning, config.seed, progress)
            rewriter: Completer | None = None
            ends: tuple[int, ...] = ()
            if section.rewriter.model or section.rewriter.endpoint:
                rewriter, ends = open_completer(section.rewriter, self.parallel.device)
            work.write(rewriter, ends)

    def _dev1(self) -> None:
        made = self.root / "cold_start" / ROWS
        data = ([str(made)] if made.exists() and made.stat().st_size else []) + list(self.config.data.cold_start)
        if not data:
            raise UserError("dev1 has nothing to learn from: put cold_start into stages, or name data.cold_start")
        self._train("sft", "dev1", self._sft(self.config.dev1, "dev1", tuple(data), self.config.base))

    def _dev2(self) -> None:
        config = self.config
        settings = self._grpo(config.dev2, "dev2", self._model("dev1"), config.format, config.data.reasoning)
        self._train("grpo", "dev2", settings)
        self._reflect("dev2", config.format, dev1=self._model("dev1"), dev2=self._model("dev2"))

    def _rejection(self) -> None:
        config, folder = self.config, self.root / "rejection"
        self._train("distill", "rejection", self._samples(config.rejection, "dev2", config.format, folder))
        self._note("rejection", self._read(folder / FILTER_REPORT))

    def _dev3(self) -> None:
        self._train("sft", "dev3", self._sft(self.config.dev3, "dev3", self._second_data(), self.config.base))

    def _r1(self) -> None:
        config, data = self.config, self.config.data
        before, steps = self._model("dev3"), int(config.r1.length.value) - config.general_steps
        first = self._grpo(config.r1, "r1/reasoning", before, config.format, data.reasoning)
        self._train("grpo", "r1/reasoning", replace(first, length=Span(steps, "steps")))
        last = self._model("r1/reasoning")
        if config.general_steps:
            second = replace(
                first,
                run_dir=str(self.root / "r1/general"),
                model=str(last),
                length=Span(config.general_steps, "steps"),
                rewards=(*first.rewards, *config.general_rewards),
                data=replace(first.data, prompts=(*first.data.prompts, *data.general)),
            )
            self._train("grpo", "r1/general", second)
            last = self._model("r1/general")
        on_main(self.parallel, lambda: publish(last, self._model("r1")))
        self.last = self._model("r1")
        self._reflect("r1", config.format, dev3=before, r1=self.last)

    def _students(self) -> None:
        for name, settings in self.config.students.items():
            self._train("sft", f"students/{name}", self._sft(settings, f"students/{name}", self._second_data(), ""))

    def _second_data(self) -> tuple[str, ...]:
        """What dev3 and the students learn from: the 800,000 samples of the report."""
        traces = self.root / "rejection" / TRACES
        given = self.config.data.non_reasoning
        found = (str(traces), *given) if traces.exists() and traces.stat().st_size else given
        if not found:
            raise UserError(
                f"no trace was kept by rejection sampling (see {self.root / 'rejection' / FILTER_REPORT}), and "
                "data.non_reasoning is empty: there is nothing to learn from"
            )
        return found

    # Settings of a stage, with what the pipeline knows.

    def _model(self, name: str) -> Path:
        return self.root / name / "model"

    def _grpo(self, own: GrpoConfig, name: str, model: Path, format: str, prompts: tuple[str, ...]) -> GrpoConfig:
        format = own.data.format or format
        thinking = own.data.thinking or format == SWITCHED
        data = replace(own.data, prompts=own.data.prompts or prompts, format=format, thinking=thinking)
        return replace(own, run_dir=str(self.root / name), model=own.model or str(model), data=data)

    def _sft(self, own: SftConfig, name: str, data: tuple[str, ...], model: str) -> SftConfig:
        model = own.model or ("" if own.fresh.wanted else model)
        section = replace(own.data, train=own.data.train or data)
        if section.format == "auto" and (own.fresh.wanted or is_ours(model)):
            section = replace(section, format=self.config.format)
        tokenizer = own.tokenizer or (self.config.base if own.fresh.wanted else "")
        return replace(own, run_dir=str(self.root / name), model=model, tokenizer=tokenizer, data=section)

    def _samples(self, section: SamplesSection, model: str, format: str, folder: Path) -> DistillConfig:
        config = self.config
        return DistillConfig(
            run_dir=str(folder),
            seed=config.seed,
            stages=(),
            reward_timeout=section.reward_timeout,
            rewards=section.rewards,
            data=PromptsSection(config.data.reasoning, section.limit),
            teacher=teacher_of(self._model(model), format, section.batch),
            sampling=section.sampling,
            filter=section.filter,
        )

    # Doing them.

    def _train(self, kind: str, name: str, settings: RunConfig | DistillConfig) -> None:
        """Run a stage, in this process or in several of its own, unless its result is there."""
        folder = self.root / name
        result = folder / (FILTER_REPORT if kind == "distill" else "model")
        done = on_main(self.parallel, lambda: self._is_done(name, result, settings))
        if not done:
            began = time.monotonic()
            try:
                self._launch_or_run(kind, folder, settings)
            finally:
                if self.parallel.is_main:  # nothing that waits for the others: one of them may have failed
                    self._took(name, time.monotonic() - began)
                self._make_room()
            if not on_main(self.parallel, result.exists):
                raise Stopped
        if kind != "distill":
            self.last = result
            records = read_metrics(folder / METRICS)
            last = records[-1] if records else {"step": -1}
            self._note(name, {"steps": last["step"] + 1} | {key: last[key] for key in LOGGED if key in last})

    def _make_room(self) -> None:
        """For the model of the next stage."""
        gc.collect()
        if self.parallel.device.type == "cuda":
            torch.cuda.empty_cache()

    def _launch_or_run(self, kind: str, folder: Path, settings: RunConfig | DistillConfig) -> None:
        if self.config.processes:
            argv = ["train", kind, str(folder / "settings.toml"), "--backend", self.backend]
            launch(argv, self.config.processes)
        elif RUNS[kind](settings, self.backend) is None:
            raise Stopped

    def _is_done(self, name: str, result: Path, settings: Section) -> bool:
        path = result.parent / "settings.toml"
        text = settings.to_toml()
        if result.exists():
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                self._say(f"note: the settings of {name} have changed since it was done; it is not done again")
            return True
        result.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "w") as file:
            file.write(text)
        return False

    def _reflect(self, stage: str, format: str, **models: Path) -> None:
        """Measure two models, by name: before and after a stage."""
        config = self.config
        if not config.data.probe or not config.probe.prompts:
            return
        for when, (name, model) in zip(("before", "after"), models.items(), strict=True):
            folder = self.root / "probes" / name
            self._say(f"reflection of {name}, {when} {stage}")
            settings = probe_settings(config.probe, config.data.probe, str(model), format, config.seed, folder)
            self._train("distill", f"probes/{name}", settings)
            path = folder / "reflection.json"

            def judged(settings: DistillConfig = settings, path: Path = path) -> dict[str, Any]:
                if not path.exists():
                    with atomic_write(path, "w") as file:
                        json.dump(measure(config.probe, settings), file, indent=1)
                found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                return found

            found = {"name": name} | on_main(self.parallel, judged)
            self.report["reflection"].setdefault(stage, {})[when] = found

    # State and report; process 0 alone writes.

    def _open(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.root / "config.toml", "w") as file:
            file.write(self.config.to_toml())

    def _took(self, name: str, seconds: float) -> None:
        path = self.root / STATE
        state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"seconds": {}}
        state["seconds"][name] = round(state["seconds"].get(name, 0.0) + seconds, 1)
        with atomic_write(path, "w") as file:
            json.dump(state, file, indent=1)

    def _note(self, name: str, values: Mapping[str, Any]) -> None:
        self.report["stages"].setdefault(name, {}).update(values)

    def _write_report(self) -> None:
        path = self.root / STATE
        seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.exists() else {}
        report = self.report | {"seconds": seconds}
        with atomic_write(self.root / OUTCOME, "w") as file:
            json.dump(report, file, indent=1, ensure_ascii=False)
        with atomic_write(self.root / READABLE, "w") as file:
            file.write(markdown(report))

    def _read(self, path: Path) -> dict[str, Any]:
        def read() -> dict[str, Any]:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found

        found: dict[str, Any] = on_main(self.parallel, read)
        return found

    def _say(self, text: str) -> None:
        Progress(self.parallel.is_main).say(text)


def count_rows(files: tuple[str, ...]) -> int:
    return sum(1 for path in data_files(files) for _ in read_records(path)) if files else 0
