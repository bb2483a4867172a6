"""One evaluation from the first task to the report, which is also written when something ends it early; and `evaluate`,
all of it in one call."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..core.generate import make_rollout
from ..core.model import DeepseekV3
from ..core.tokenizer import Tokenizer
from .contamination import Overlap
from .items import Item, Task
from .jobs import Job, Loaded, load, named, run_all
from .locate import Places
from .protocols import Protocol, protocol
from .report import write_report
from .results import Result
from .runner import Options
from .store import digest, model_digest
from .subject import BATCH, LocalSubject, Progress, Subject
from .suites import Suite


@dataclass
class Session:
    """One evaluation: what was measured so far, and what the report says about it.

    about: the model and the machine as plain data: name, digest, format, context, device, devices, machine.
    command: what runs the same again.
    """

    subject: Subject
    about: Mapping[str, Any]
    options: Options
    progress: Progress
    command: str = ""
    suite: Suite | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    ran: list[tuple[Result, Task, Sequence[Item]]] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)

    def measure(self, jobs: Sequence[Job], loaded: Sequence[Loaded | None] | None = None, **how: Any) -> None:
        """Run jobs; see `run_all` for the rest."""
        for done, result in run_all(jobs, self.subject, self.options, self.progress, loaded=loaded, **how):
            self.results.append(result)
            if done.task is not None:
                self.ran.append((result, done.task, done.items))

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Writes the report of what was measured in the block, even where it ends with an error."""
        try:
            yield
        except BaseException:
            if self.results:
                self.report()
            raise
        self.report()

    def report(self) -> None:
        write_report(
            self.options.out,
            self.results,
            subject=self.about,
            command=self.command,
            suite=self.suite,
            reasons=self.reasons,
            overlaps=self.overlaps,
        )


def evaluate(
    directory: Path,
    data: Mapping[str, Path],
    options: Options,
    progress: Progress,
    *,
    protocol_name: str = "greedy",
    batch: int = BATCH,
    reflection: bool = False,
    machine: Mapping[str, Any] | None = None,
    command: str = "",
) -> list[Result]:
    """Measure the model in `directory`, write the report into `options.out`, and return its rows.

    data: name of a task -> its file or folder. A name that is no task of ours is data of one's own, see tasks/custom:
    JSON lines with `prompt` (put to the model as it stands) and `answer`. machine, command: for the report.
    Raises UserError for a model or data that cannot be read; Unfinished, and the same call goes on where it ended.
    """
    asked = protocol(protocol_name)
    jobs = named(list(data), asked, Places((), dict(data)))
    loaded = [load(job) for job in jobs]
    tokenizer = Tokenizer.load(directory)
    model = DeepseekV3.from_pretrained(directory, backend="auto").eval()
    rollout = make_rollout(model, partial(tokenizer.decode, skip_special=True))
    name = digest([model_digest(directory), None, "keep"])  # the weights as they are: no other precision
    subject = LocalSubject(rollout, tokenizer, directory.name, name, batch)
    about = describe(subject, asked) | ({"machine": machine} if machine else {})
    session = Session(subject, about, options, progress, command)
    with session.reported():
        session.measure(jobs, loaded, reflection=reflection)
    return session.results


def describe(subject: Subject, asked: Protocol) -> dict[str, Any]:
    """What a report says of a model: name, digest, format, context, device, devices, and of weights that are here their
    type and number."""
    about: dict[str, Any] = {
        "name": subject.name,
        "digest": subject.digest,
        "format": subject.describe(asked.thinks) if asked.chat else "none",
        "context": subject.context,
        "device": "server",
        "devices": subject.devices,
    }
    if isinstance(subject, LocalSubject):
        model = subject.rollout.model
        weights = model.model.embed_tokens.weight
        about |= {"device": weights.device.type, "dtype": str(weights.dtype).removeprefix("torch.")}
        about["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return about
