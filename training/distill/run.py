"""Distillation as a row of stages, each of which goes on where it was interrupted, and is skipped where it is done.

    RUN/samples*.jsonl      the teacher's replies (sampling.py)
    RUN/scores-*.jsonl      what the rewards say about them (verify.py)
    RUN/traces.jsonl ...    what is fit to learn from, and the report on the rest (traces.py)
    RUN/sft logits onpolicy the student's runs, those of `stages`
    RUN/model               the student, as the last of them left it

R1's distilled models are the first three and plain fine-tuning on 800,000 traces (R1 report, section 2.4).
"""

import gc
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...core.completer import Completer
from ...core.files import atomic_directory, atomic_write
from ...errors import UserError
from ...ops.op import activate_backend
from ...parallel.data import DataParallel
from ..config import RunConfig
from ..progress import Progress
from ..rewards.registry import build
from ..sft.run import sft
from .config import DistillConfig
from .logits import logits
from .onpolicy import onpolicy
from .prompts import Prompt, load_prompts
from .sampling import KEYS, SAMPLES, Sampler, check_settings, missing
from .student_config import StudentConfig
from .teacher import identity, open_completer
from .traces import REPORT, TRACES, TraceWriter, clean, load_benchmarks
from .verify import scores_log, verify
from .worklog import WorkLog

RUNS: dict[str, Callable[[Any, str], Path | None]] = {"sft": sft, "logits": logits, "onpolicy": onpolicy}
Learner = TypeVar("Learner", bound=StudentConfig)

PATIENCE = timedelta(days=7)  # a process whose share of the samples was short waits for the others
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.md")
MADE_FROM = "made_from.json"


def distill(config: DistillConfig, backend: str = "auto") -> Path | None:
    """Run, or go on with, the distillation that `config` describes. Returns the directory of the student (of the
    traces' run where no stage follows them), or None where a signal ended a stage early.
    """
    device = activate_backend(backend).device
    with DataParallel.start(device, PATIENCE) as parallel:
        report = collect(config, parallel)
        return train_student(config, backend, report["fingerprint"], parallel)


def collect(config: DistillConfig, parallel: DataParallel, teacher: Completer | None = None) -> dict[str, Any]:
    """Sample, verify and filter what is not there yet; the filter's report, on every process.

    teacher: to ask in place of the one that the settings name, of which traces tell all the same.
    """
    run_dir = Path(config.run_dir)
    with Progress(parallel.is_main) as progress, build(config.rewards, config.reward_timeout) as rewards:
        rewards.say = progress.say
        found = on_main(parallel, lambda: _open(config, run_dir))
        prompts, dropped, known = found
        on_main(parallel, lambda: rewards.check_rows([{**prompt.row(), "_where": prompt.where} for prompt in prompts]))
        if dropped:
            progress.say(f"{len(dropped):,} of {len(prompts) + len(dropped):,} prompts are in a benchmark: left out")
        samples, scores = WorkLog(run_dir, SAMPLES, KEYS), scores_log(run_dir, config.rewards)
        try:
            draw(config, prompts, samples, parallel, progress, teacher)
            parallel.barrier()
            problems = verify(rewards, prompts, samples, scores, parallel, progress)
            parallel.barrier()
        except KeyboardInterrupt:
            progress.say("interrupted; what was sampled is kept, run the same command to go on")
            raise

        def write() -> dict[str, Any]:
            benchmarks = load_benchmarks(config.filter.benchmarks, config.filter.contamination_ngram)
            writer = TraceWriter(config, prompts, dropped, known, benchmarks)
            fingerprint = writer.fingerprint(samples, scores)
            if writer.is_done(fingerprint):
                report: dict[str, Any] = json.loads((run_dir / REPORT).read_text(encoding="utf-8"))
                return report
            return writer.write(samples, scores, problems, fingerprint, progress)

        return on_main(parallel, write)


def _open(config: DistillConfig, run_dir: Path) -> tuple[list[Prompt], list[dict[str, str]], dict[str, Any]]:
    """Prompts, those among them that a benchmark holds, and who the teacher is."""
    benchmarks = load_benchmarks(config.filter.benchmarks, config.filter.contamination_ngram)
    prompts, dropped = clean(load_prompts(config.data.prompts, config.data.limit), benchmarks)
    if not prompts:
        raise UserError("no prompt is left: all of them are in filter.benchmarks" if dropped else "there is no prompt")
    run_dir.mkdir(parents=True, exist_ok=True)
    known = identity(config.teacher, run_dir)
    check_settings(run_dir, config.sampling, config.seed, known)
    with atomic_write(run_dir / "config.toml", "w") as file:
        file.write(config.to_toml())
    return prompts, dropped, known


def draw(
    config: DistillConfig,
    prompts: Sequence[Prompt],
    samples: WorkLog,
    parallel: DataParallel,
    progress: Progress,
    teacher: Completer | None = None,
) -> None:
    """Sample what is missing: this process's share of it, or, from an endpoint, process 0 all of it."""
    items = missing(prompts, config.sampling, config.seed, samples)
    # Its own count decides, as process 0 may have seen more of a shared folder than the others.
    places = parallel.broadcast_object([(prompt.id, seed) for prompt, seed in items])
    by_id = {prompt.id: prompt for prompt in prompts}
    if config.teacher.endpoint:
        chosen = places if parallel.is_main else []
    else:
        chosen = [places[i] for i in parallel.share(len(places))]
    if not chosen:
        return
    with samples.open(parallel.rank):
        sampler = Sampler(config.sampling, samples, progress)
        if teacher is None:
            teacher, sampler.stop_token_ids = open_completer(config.teacher, parallel.device, sampler.on_refusal)
        batch = 0 if config.teacher.endpoint else config.teacher.batch
        sampler.sample(teacher, [(by_id[id], seed) for id, seed in chosen], batch)
    if sampler.refused:
        progress.say(f"{sampler.refused:,} requests were refused; they count as samples without a reply")
    del teacher
    gc.collect()  # a local teacher makes room for the student
    if parallel.device.type == "cuda":
        torch.cuda.empty_cache()


def train_student(config: DistillConfig, backend: str, fingerprint: str, parallel: DataParallel) -> Path | None:
    """Run the stages of the student. fingerprint: of the traces."""
    run_dir = Path(config.run_dir)
    last = ""
    for kind in config.stages:
        folder = run_dir / kind
        done, stale = on_main(parallel, lambda folder=folder: _state(folder, fingerprint))
        if stale:
            raise UserError(
                f"the traces have changed since {folder} was begun: remove that folder, or use another run_dir"
            )
        if not done and RUNS[kind](student_settings(config, kind, last), backend) is None:
            return None
        last = str(folder / "model")
    if not last:
        return run_dir
    on_main(parallel, lambda: publish(Path(last), run_dir / "model"))
    return run_dir / "model"


def student_settings(config: DistillConfig, kind: str, last: str = "") -> RunConfig:
    """The settings of a stage of the student, with what they leave open. last: the model of the stage before."""
    run_dir = Path(config.run_dir)
    learnt = (str(run_dir / TRACES), *config.data.conversations)
    if kind == "sft":
        student = config.student
        data = replace(student.data, train=student.data.train or learnt)
        return replace(student, run_dir=str(run_dir / "sft"), data=data)
    if kind == "logits":
        own = _with_models(config, config.logits, kind, last)
        return replace(own, data=replace(own.data, train=own.data.train or learnt))
    settings = _with_models(config, config.onpolicy, kind, last)
    return replace(
        settings,
        prompts=settings.prompts or config.data.prompts,
        traces=settings.traces or learnt,
        format=settings.format or config.teacher.format,
    )


def _with_models(config: DistillConfig, own: Learner, kind: str, last: str) -> Learner:
    """Teacher and student: what is not named is the teacher of the samples, and the model of the stage before or the
    student of the distillation."""
    teacher = own.teacher if own.teacher.model else replace(own.teacher, model=config.teacher.model)
    if not teacher.model:
        raise UserError(f"{kind}.teacher.model is not set: an endpoint gives no probabilities to learn from")
    if not own.model and not own.fresh.wanted:
        if last or config.student.model:
            own = replace(own, model=last or config.student.model)
        else:
            own = replace(own, fresh=config.student.fresh)
    return replace(own, run_dir=str(Path(config.run_dir) / kind), teacher=teacher)


def _state(folder: Path, fingerprint: str) -> tuple[bool, bool]:
    """(is the stage done?, was it begun with other traces?); notes with which it begins now."""
    path = folder / MADE_FROM
    if path.exists():
        stale = json.loads(path.read_text(encoding="utf-8"))["traces"] != fingerprint
        return (folder / "model").exists(), stale
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        json.dump({"traces": fingerprint}, file)
    return False, False


def publish(source: Path, target: Path) -> None:
    """Show the model of a stage at `target`, by hard links where the file system has them."""
    files = sorted(file for file in source.iterdir() if file.is_file())
    with atomic_directory(target, owned=MODEL_FILES) as folder:
        for file in files:
            try:
                os.link(file, folder / file.name)
            except OSError:
                shutil.copyfile(file, folder / file.name)


def on_main(parallel: DataParallel, work: Any) -> Any:
    """What `work` gives on process 0, on every process; a UserError there is one everywhere."""
    outcome: Mapping[str, Any] = {}
    if parallel.is_main:
        try:
            outcome = {"value": work()}
        except UserError as error:
            outcome = {"error": str(error)}
    outcome = parallel.broadcast_object(outcome)
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]
