"""`dsv3 quickstart`: the whole way at laptop size, from the files of this machine to a model.

    OUT/tokenizer         a byte-level BPE learnt from text and code found here
    OUT/data              that text and code as tokens
    OUT/pretrain          the run: checkpoints, log, samples (settings: OUT/pretrain.toml)
    OUT/model             the model in the Hugging Face format
    OUT/*.png             loss, expert load, and all of it in one picture
    OUT/report.json       what came out

Each of these is made by a stage that is skipped where its result is there, and each appears as a whole or not at all,
so a run that was interrupted goes on where it was, and one that is finished does nothing.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.files import atomic_directory, atomic_write, human_bytes
from ..core.tokenizer import Tokenizer
from ..errors import UserError
from ..ops.op import activate_backend
from .config import PretrainConfig
from .data.corpus import machine_sources
from .data.prepare import prepare
from .data.shards import SPLITS, TokenSet
from .data.sources import Document, Source
from .launch import ProcessFailed, launch, processes_for_this_machine
from .loop import METRICS
from .metrics import read_metrics
from .plots import draw
from .progress import Progress
from .quickstart_folder import Folder, exceptions_for_signals
from .quickstart_picture import draw_summary
from .quickstart_report import build_report, report_lines, validations
from .verbs import SHIPPED

SETTINGS = SHIPPED / "pretrain" / "quickstart.toml"
TOKENIZER_BYTES = 3_000_000  # of text to learn the tokenizer from: more takes longer and changes little
HELD_OUT = 0.02  # of the documents
INTERRUPTED = 130

Train = Callable[[Path, int, str, Folder], None]
Sources = Callable[[], Sequence[Source]]


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


def train_in_processes(settings: Path, processes: int, backend: str, folder: Folder) -> None:
    """The run of a settings file in processes of its own, which keep the folder locked while they live."""
    argv = ["train", "pretrain", str(settings), "--backend", backend]
    launch(argv, processes, keep_open=[folder.lock])


def quickstart(
    out: str | Path,
    *,
    seed: int | None = None,
    processes: int | None = None,
    backend: str = "auto",
    overrides: Sequence[str] = (),
    sources: Sources = machine_sources,
    train: Train = train_in_processes,
) -> dict[str, Any]:
    """Do what is not done yet in `out`, and return the report.

    seed: of the run; None: the shipped settings'. processes: data-parallel ones; None: as many as serve this machine.
    overrides: `key=value` over the shipped settings. sources: where the text comes from. train: runs a settings file.
    Raises UserError for a folder that holds something else, a full disk, and a model that has not learnt.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("quickstart draws pictures with matplotlib: pip install 'dsv3[train]'")
    if processes is not None and processes < 1:
        raise UserError(f"--processes must be 1 or more, not {processes}")
    config = PretrainConfig.load(SETTINGS, [*overrides, *([f"seed={seed}"] if seed is not None else [])])
    device = activate_backend(backend).device
    processes = processes or (processes_for_this_machine() if device == "cpu" else 1)
    progress = Progress()
    with Folder(Path(out).absolute(), config.seed, progress.say) as folder:
        return Quickstart(folder, _below(config, folder.path), progress, sources).run(processes, backend, train)


def _below(config: PretrainConfig, out: Path) -> PretrainConfig:
    """The settings with their paths put under `out`."""

    def moved(folder: str) -> str:
        return str(out / "data" / Path(folder).name)

    data = replace(
        config.data,
        sources={moved(folder): weight for folder, weight in config.data.sources.items()},
        validation={name: moved(folder) for name, folder in config.data.validation.items()},
    )
    return replace(config, run_dir=str(out / "pretrain"), tokenizer=str(out / "tokenizer"), data=data)


class Quickstart:
    """The stages."""

    def __init__(self, folder: Folder, config: PretrainConfig, progress: Progress, sources: Sources) -> None:
        self.folder, self.config, self.progress = folder, config, progress
        self.out, self.run_dir = folder.path, Path(config.run_dir)
        self._sources, self._found = sources, list[Source]()

    def run(self, processes: int, backend: str, train: Train) -> dict[str, Any]:
        tokenizer, data, trained = self.out / "tokenizer", self.out / "data", self.run_dir / "model"
        with self.progress:
            self._stage("find", self._find, tokenizer, data)
            self._stage("tokenizer", self._tokenizer, tokenizer)
            self._stage("data", self._data, data)
        # The run has a live line of its own.
        self._stage("pretrain", lambda: self._pretrain(processes, backend, train), trained)
        with self.progress:
            self._stage("model", self._model, self.out / "model")
            self._stage("report", self._report, self.out / "report.json")
        report: dict[str, Any] = json.loads((self.out / "report.json").read_text(encoding="utf-8"))
        return report

    def _stage(self, name: str, work: Callable[[], None], *results: Path) -> None:
        if not all(result.exists() for result in results):
            with self.folder.timed(name):
                work()

    def _find(self) -> None:
        """Read what there is, before the stages that ask for it."""
        self.progress.show("looking for text and code on this machine")
        self._found = list(self._sources())
        self.progress.say("found on this machine: " + ", ".join(_size(source) for source in self._found))

    def _tokenizer(self) -> None:
        size = self.config.model.resolve().vocab_size
        texts = sample_texts(self._found, TOKENIZER_BYTES)
        self.progress.show(f"learning a tokenizer of {size:,} tokens")
        with atomic_directory(self.out / "tokenizer") as target:
            Tokenizer.train(texts, size, single_digits=True).save(target)
        read = human_bytes(sum(len(text.encode()) for text in texts))
        self.progress.say(f"tokenizer: {size:,} tokens, learnt from {read}")

    def _data(self) -> None:
        def report(name: str, documents: int, tokens: int) -> None:
            self.progress.show(f"preparing {name}: {documents:,} documents, {tokens:,} tokens")

        tokenizer = Tokenizer.load(self.out / "tokenizer")
        with atomic_directory(self.out / "data") as target:
            sets = prepare(self._found, tokenizer, target, validation_fraction=HELD_OUT, report=report)
        counts = [(tokens.name, *(tokens.count(split)["tokens"] for split in SPLITS)) for tokens in sets]
        shown = (f"{train:,} tokens of {name} and {held_out:,} held out" for name, train, held_out in counts)
        self.progress.say("data: " + ", ".join(shown))

    def _pretrain(self, processes: int, backend: str, train: Train) -> None:
        settings = self.out / "pretrain.toml"
        with atomic_write(settings, "w") as file:
            file.write(self.config.to_toml())
        self.progress.say(
            f"pre-training: {self.config.length} of {self.config.batch.sequences} x {self.config.data.seq_len} tokens "
            f"in {processes} process{'es' if processes > 1 else ''}; Ctrl-C saves a checkpoint to go on from"
        )
        train(settings, processes, backend, self.folder)
        if not (self.run_dir / "model").exists():  # it was asked to stop, by a signal that did not reach us
            raise KeyboardInterrupt
        self.folder.note("processes", processes)

    def _model(self) -> None:
        records = read_metrics(self.run_dir / METRICS)
        for name, values in validations(records).items():
            before, after = values[0][1], values[-1][1]
            if not after < before:
                raise UserError(
                    f"it has not learnt: held-out {name} takes {after:.3f} bits per byte after training and took "
                    f"{before:.3f} before; see {self.run_dir / METRICS}, and try another --seed with another --out"
                )
        draw(records, self.out)
        source = self.run_dir / "model"
        files = sorted(source.iterdir())
        needed = sum(file.stat().st_size for file in files)
        with atomic_directory(self.out / "model", needed=needed) as target:
            for file in files:
                (target / file.name).write_bytes(file.read_bytes())

    def _report(self) -> None:
        self.progress.show("the model goes on with two prompts")
        sets = [TokenSet.open(path, verify=False) for path in sorted(self.config.data.sources)]
        records = read_metrics(self.run_dir / METRICS)
        report = build_report(self.out / "model", self.config, records, sets, self.folder.facts)
        draw_summary(records, report, self.out / "quickstart.png")
        with atomic_write(self.out / "report.json", "w") as file:
            json.dump(report, file, indent=2, ensure_ascii=False)


def _size(source: Source) -> str:
    texts = [document.text for document in source.documents()]
    return f"{len(texts):,} texts of {source.name} ({human_bytes(sum(len(text.encode()) for text in texts))})"


def sample_texts(sources: Sequence[Source], limit: int) -> list[str]:
    """About `limit` bytes of the sources' documents, chosen by hash: the same each time, of all kinds in proportion."""
    documents = [document for source in sources for document in source.documents()]

    def place(document: Document) -> bytes:
        return hashlib.sha256(document.id.encode()).digest()

    chosen, size = list[str](), 0
    for document in sorted(documents, key=place):
        chosen.append(document.text)
        size += len(document.text.encode())
        if size >= limit:
            break
    return chosen
