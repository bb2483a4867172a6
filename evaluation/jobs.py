"""What one row of a report takes: finding its data, reading it before anything is run, and running it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError
from . import needle, perplexity
from .items import Data, Item, Kind, Task
from .locate import Places
from .protocols import PROTOCOLS, Protocol
from .reading import TEXTS
from .reflection import Traces, analyse
from .results import Result
from .runner import Options, Runner, check
from .scoring import Graders
from .subject import Progress, Subject
from .tasks import TASKS, closest, custom

NEEDLE, PILE = "needle", "pile"


@dataclass(frozen=True)
class Job:
    """A row that is wanted. task: a name of ours, or of the user's own data. place: of the data, None for what is made
    up. shots: instead of those of the command line and the task. text: bits per byte of the text at `place`."""

    task: str
    protocol: Protocol
    place: Path | None = None
    shots: int | None = None
    text: bool = False

    @property
    def name(self) -> str:
        return f"{self.task}, {self.protocol.name}"


def named(tasks: Sequence[str], protocol: Protocol, places: Places) -> list[Job]:
    """The jobs of `--tasks`. UserError for unknown names, and for data that is not there."""
    jobs = []
    for name in dict.fromkeys(tasks):
        if name == NEEDLE:
            jobs.append(Job(name, protocol, places.find(name) if name in places.single else None))
        elif name == PILE:
            jobs.append(Job(name, PROTOCOLS["base"], places.need(name, TEXTS), text=True))
        elif name in TASKS:
            jobs.append(Job(name, protocol, places.need(name, TASKS[name].files)))
        elif name in places.single:
            jobs.append(Job(name, protocol, places.single[name]))
        else:
            close = closest(name, (NEEDLE, PILE))
            hint = f"did you mean {close!r}?" if close else "`dsv3 eval --list` names them"
            raise UserError(f"unknown task {name!r}; {hint} (data of your own: --data {name}=FILE.jsonl)")
    return jobs


@dataclass(frozen=True)
class Loaded:
    """A job whose data was read and found good; task and data are None for texts."""

    job: Job
    task: Task | None = None
    data: Data | None = None

    @property
    def items(self) -> Sequence[Item]:
        return [] if self.data is None else self.data.items


def load(job: Job) -> Loaded | None:
    """Read the data of a job. None for the needle, whose texts need a tokenizer; see `hide`."""
    if job.task == NEEDLE:
        return None
    if job.text:
        assert job.place is not None
        next(perplexity.documents(job.place, job.task), None)
        return Loaded(job)
    assert job.place is not None
    if job.task in TASKS:
        task = TASKS[job.task]
        data = task.read(job.place)
    else:
        task, data = custom.read(job.place, job.task)
    check(task, data)
    return Loaded(job, task, data)


def hide(job: Job, subject: Subject, lengths: Sequence[int] | None, seed: int) -> Loaded:
    """The needle's texts, for this model. lengths: None for those that fit its context."""
    if subject.context is None and not lengths:
        raise UserError("needle: the server's context is not known; give --context, or the lengths with --lengths")
    chosen = lengths or needle.default_lengths(subject.context or needle.LONGEST)
    thinks = job.protocol.chat and job.protocol.thinks
    task, data = needle.needle_task(chosen, subject.context, thinks, _counter(subject), seed, job.place)
    return Loaded(job, task, data)


def _counter(subject: Subject) -> Callable[[str], int] | None:
    if subject.tokens("a") is None:
        return None
    return lambda text: len(subject.tokens(text) or [])


def _run(loaded: Loaded, runner: Runner, reflection: bool) -> Result:
    """The row of a job. reflection: also compare first and final answers, where replies hold thoughts."""
    job, task, data = loaded.job, loaded.task, loaded.data
    if task is None or data is None:
        assert job.place is not None
        title = "Pile" if job.task == PILE else job.task
        return perplexity.bits_per_byte(runner.subject, job.place, job.task, title, runner.options, runner.progress)
    wanted = reflection and job.protocol.chat and task.kind in (Kind.MATH, Kind.TEXT)
    traces = Traces() if wanted else None
    result = runner.run(task, data, job.protocol, traces)
    if traces is not None:
        result.extra["reflection"] = analyse(
            runner.subject,
            task.name,
            traces.found,
            runner.graders.math,
            job.protocol.with_options(runner.options.samples, runner.options.max_tokens),
            runner.options,
            runner.progress,
        )
    return result


def run_all(
    jobs: Sequence[Job],
    subject: Subject,
    options: Options,
    progress: Progress,
    *,
    unsafe: bool = False,
    reflection: bool = False,
    lengths: Sequence[int] | None = None,
    loaded: Sequence[Loaded | None] | None = None,
) -> Iterator[tuple[Loaded, Result]]:
    """Jobs with their results as they come. All data is read before the first one is run.

    unsafe: run generated programs without a sandbox where there is none. lengths: of the needle's texts.
    loaded: the jobs' data where it has been read before.
    """
    read = [load(job) for job in jobs] if loaded is None else loaded
    ready = [
        hide(job, subject, lengths, options.seed) if each is None else each
        for job, each in zip(jobs, read, strict=True)
    ]
    with Graders(unsafe=unsafe) as graders:
        runners = []
        for job, each in zip(jobs, ready, strict=True):
            chosen = options if job.shots is None else replace(options, shots=job.shots)
            runners.append(Runner(subject, graders, chosen, progress))
            if each.task is None or each.data is None:
                perplexity.check(subject, job.task)
            else:
                runners[-1].prepare(each.task, each.data, job.protocol)
        for each, runner in zip(ready, runners, strict=True):
            yield each, _run(each, runner, reflection)
