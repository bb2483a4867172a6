"""`dsv3 eval`: from its options to results and a report.

All data is read before the weights are, and all of it before the first task runs. Replies are kept as they come, the
report is written even where a task fails, and the same command asks only for the replies that are missing.
"""

import argparse
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from . import doctor, talk
from .backends import activate
from .core.encoding import detect_format
from .core.endpoint import Endpoint
from .core.tokenizer import Tokenizer
from .errors import UserError
from .evaluation import contamination
from .evaluation.asking import Unfinished
from .evaluation.harness import run_harness
from .evaluation.items import plural
from .evaluation.jobs import Job, Loaded, load, named
from .evaluation.locate import Places
from .evaluation.protocols import PROTOCOLS, Protocol, protocol
from .evaluation.published import LM
from .evaluation.reading import library
from .evaluation.report_tables import digits_of, ours, scaled
from .evaluation.results import Result
from .evaluation.runner import Options
from .evaluation.session import Session, describe
from .evaluation.store import digest, model_digest
from .evaluation.subject import ChatSubject, LocalSubject, Subject
from .evaluation.suites import Suite, suite
from .training.data.shards import TokenSet
from .training.data.transforms import tokenizer_fingerprint
from .training.progress import Progress

THINKERS = ("r1", "v3.1")  # chat formats that open a thought


@dataclass
class Plan:
    """What the options ask for. jobs, with their data; lm: tasks of lm-eval. reasons: why rows of the suite are not
    run, by "TASK.PROTOCOL"."""

    jobs: list[Job] = field(default_factory=list)
    loaded: list[Loaded | None] = field(default_factory=list)
    lm: list[str] = field(default_factory=list)
    suite: Suite | None = None
    reasons: dict[str, str] = field(default_factory=dict)


def run(args: argparse.Namespace) -> None:
    talk.forgive_encodings()
    server = args.model.startswith(("http://", "https://"))
    if server and args.revision:
        raise UserError("--revision is for ids of the hub; leave it out where MODEL is a server")
    for option in ("batch", "concurrency"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option} must be 1 or more")
    source = None if server else talk.open_source(args.model, args.revision)
    asked = protocol(args.protocol or usual_protocol(None if source is None else source.tokenizer))
    plan = make_plan(args, asked, server)
    lengths = _numbers(args.lengths, "--lengths") if args.lengths else None
    out = Path(args.out) if args.out else Path("runs/eval") / _short(args.name or args.model)
    options = Options(out, args.seed, args.shots, args.samples, args.max_tokens, args.limit)
    command = shlex.join(["dsv3", *args.argv])
    with Progress() as progress:
        subject = _server(args) if source is None else _local(source, args)
        about = _about(subject, asked, args.devices if server else None)
        session = Session(subject, about, options, progress, command, plan.suite, plan.reasons)
        progress.say(f"{subject.name}: protocol {asked.name}; replies and report go to {out}")
        try:
            with session.reported():
                session.measure(plan.jobs, plan.loaded, unsafe=args.unsafe, reflection=args.reflection, lengths=lengths)
                if plan.lm:
                    session.results += _harness(session, plan, args)
                if args.contamination:
                    corpora = [Path(path) for path in args.contamination]
                    shards = None if source is None else partial(_documents, source.tokenizer)
                    session.overlaps += contamination.check(session.ran, corpora, out, progress, shards)
        except Unfinished as error:
            raise UserError(f"{error}; go on with: {command}") from error
    if args.json:
        print((out / "report.json").read_text(encoding="utf-8"))
    else:
        print("\n".join(_lines(session.results)))
        print(f"report: {out / 'report.html'}")


def usual_protocol(tokenizer: Tokenizer | None) -> str:
    """The protocol that fits a model: r1 for one that thinks, v3 for one that chats and for servers, else base."""
    if tokenizer is None:
        return "v3"
    try:
        return "r1" if detect_format(tokenizer) in THINKERS else "v3"
    except UserError:
        return "base"


def make_plan(args: argparse.Namespace, asked: Protocol, server: bool) -> Plan:
    """Find and read all data. UserError for tasks that are unknown, data that is not there, and nothing to do."""
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    places = Places.parse(args.data)
    plan = Plan(lm=[name.removeprefix(LM) for name in names if name.startswith(LM)])
    if plan.lm:
        library("lm_eval", ", ".join(LM + name for name in plan.lm))
    plan.jobs = named([name for name in names if not name.startswith(LM)], asked, places)
    for text in args.perplexity:
        plan.jobs.append(Job(_short(text), PROTOCOLS["base"], Path(text), text=True))
    if args.suite:
        plan.suite = suite(args.suite)
        if args.protocol:
            plan.suite = plan.suite.only([asked.name])
        _add_suite(plan, places, server)
    elif not (plan.jobs or plan.lm):
        raise UserError("nothing to measure: give --tasks, --suite or --perplexity; --list names the tasks")
    if left := places.unknown([job.task for job in plan.jobs]):
        raise UserError(f"--data {left[0]}={places.single[left[0]]} is for no task that is run; name it in --tasks")
    if not (plan.jobs or plan.lm):
        where = ", ".join(map(str, places.folders)) or "--data, which is not given"
        raise UserError(f"--suite {args.suite}: none of its data is in {where}; --list names the files")
    plan.loaded = [load(job) for job in plan.jobs]
    return plan


def _add_suite(plan: Plan, places: Places, server: bool) -> None:
    """The jobs of the suite's rows whose data is there; for the others, why not."""
    assert plan.suite is not None
    there = {(job.task, job.protocol.name) for job in plan.jobs}
    for row in plan.suite.rows:
        if row.task is None or (row.task, row.protocol) in there:
            continue
        there.add((row.task, row.protocol))
        reason = ""
        if row.task.startswith(LM):
            if row.task.removeprefix(LM) not in plan.lm:
                reason = f"lm-eval fetches its data from the hub; --tasks {row.task} runs it"
        elif places.find(row.task) is None:
            reason = "data absent"
        elif server and row.protocol == "base":
            reason = "a server that chats cannot be asked as base models are"
        else:
            job = named([row.task], PROTOCOLS[row.protocol], places)[0]
            plan.jobs.append(replace(job, shots=row.published.shots if row.protocol == "base" else None))
        if reason:
            plan.reasons[f"{row.task}.{row.protocol}"] = reason


def _local(source: talk.Source, args: argparse.Namespace) -> LocalSubject:
    rollout = source.load(args)
    name = digest([model_digest(source.directory), args.dtype, args.fp8])
    return LocalSubject(rollout, source.tokenizer, _short(args.model), name, args.batch)


def _server(args: argparse.Namespace) -> ChatSubject:
    if not args.name:
        raise UserError("say which of the server's models is meant with --name NAME")
    try:
        body = json.loads(args.body) if args.body else {}
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise UserError("--body must be a JSON object")
    endpoint = Endpoint(
        args.model, args.name, args.api_key_env, args.timeout, args.retries, args.concurrency, extra=body
    )
    endpoint.check()
    return ChatSubject(endpoint, digest([endpoint.base, args.name, body]), args.context, args.devices or 1)


def _about(subject: Subject, asked: Protocol, devices: int | None = None) -> dict[str, Any]:
    """What the report says of the model and the machine. devices: GPUs that serve it, where the user counts them."""
    backend = activate("auto")
    about = describe(subject, asked) | {"machine": doctor.describe_machine(backend)}
    if isinstance(subject, LocalSubject):
        about["backend"] = backend.name
    elif devices is not None:
        about["device"] = "cuda"
    if isinstance(subject, ChatSubject) and isinstance(subject.completer, Endpoint):
        about["server"] = urlsplit(subject.completer.base).netloc
    return about


def _harness(session: Session, plan: Plan, args: argparse.Namespace) -> list[Result]:
    """lm-eval's tasks: as it asks them itself, unless a protocol is chosen."""
    asked = protocol(args.protocol) if args.protocol else None
    return run_harness(
        session.subject,
        plan.lm,
        include_path=Path(args.harness_path) if args.harness_path else None,
        limit=args.limit,
        shots=args.shots,
        max_tokens=args.max_tokens,
        chat=None if asked is None else asked.chat,
        thinks=asked is not None and asked.thinks,
        seed=args.seed,
        out=session.options.out,
        progress=session.progress,
    )


def _documents(tokenizer: Tokenizer, folder: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of the documents in a folder of token shards."""
    tokens = TokenSet.open(folder, verify=False)
    if tokens.manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise UserError(f"--contamination {folder}: was made with another tokenizer than the model's; give the texts")
    documents = tokens.documents("train")
    for number in range(len(documents)):
        yield f"{folder}, document {number}", tokenizer.decode(documents.tokens(number).tolist())


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option}: {text!r} is no list of whole numbers, such as 1024,4096") from None


def _short(name: str) -> str:
    """A name for a folder: of a model's directory, hub id or server, or of a file."""
    path = Path(name.rstrip("/"))
    return path.name.split(".")[0] if path.is_file() else path.resolve().name if path.is_dir() else path.name


def _lines(results: Sequence[Result]) -> Iterator[str]:
    """A line for each result."""
    for result in results:
        yield (
            f"{result.title}, {result.protocol}: {ours(*scaled(result), digits_of(result))}, {result.metric}, "
            f"{result.items:,} of {plural(result.of, 'item')}"
            + (f"; not as the protocol says: {'; '.join(result.flags)}" if result.flags else "")
        )
