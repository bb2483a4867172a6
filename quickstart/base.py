"""The first half of a quickstart: from the files of this machine to a base model."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from ..core.files import atomic_directory, human_bytes
from ..core.tokenizer import Tokenizer
from ..errors import UserError
from ..training.config import PretrainConfig
from ..training.data.prepare import prepare
from ..training.data.shards import SPLITS
from ..training.data.sources import Document, Source
from ..training.loop import METRICS
from ..training.metrics import read_metrics
from .arithmetic import texts_for_tokenizer, transcripts
from .report import validations
from .workshop import Workshop

Sources = Callable[[], Sequence[Source]]

TOKENIZER_BYTES = 3_000_000  # of text to learn the tokenizer from: more takes longer and changes little
TOKENIZER_TASKS = 3_000  # questions with their thoughts beside it
HELD_OUT = 0.02  # of the documents


class BaseModel:
    """The stages. sources: where text comes from."""

    def __init__(self, workshop: Workshop, sources: Sources) -> None:
        self.workshop, self.out, self.progress = workshop, workshop.out, workshop.progress
        self.config = settings(workshop)
        self._sources, self._found = sources, list[Source]()

    def find(self) -> None:
        """Read what there is, before the stages that ask for it."""
        self.progress.show("looking for text and code on this machine")
        self._found = list(self._sources())
        self.progress.say("found on this machine: " + ", ".join(_size(source) for source in self._found))

    def tokenizer(self) -> None:
        size = self.config.model.resolve().vocab_size
        texts = sample_texts(self._found, TOKENIZER_BYTES)
        tasks = list(texts_for_tokenizer(TOKENIZER_TASKS, self.workshop.seed))
        self.progress.show(f"learning a tokenizer of {size:,} tokens")
        with atomic_directory(self.out / "tokenizer") as target:
            Tokenizer.train([*texts, *tasks], size, single_digits=True).save(target, chat_format="r1")
        read = human_bytes(sum(len(text.encode()) for text in texts))
        self.progress.say(f"tokenizer: {size:,} tokens, learnt from {read} and {len(tasks):,} questions")

    def data(self) -> None:
        def report(name: str, documents: int, tokens: int) -> None:
            self.progress.show(f"preparing {name}: {documents:,} documents, {tokens:,} tokens")

        tokenizer = Tokenizer.load(self.out / "tokenizer")
        sources = [*self._found, transcripts(self.workshop.seed)]
        with atomic_directory(self.out / "data") as target:
            sets = prepare(sources, tokenizer, target, validation_fraction=HELD_OUT, report=report)
        counts = [(tokens.name, *(tokens.count(split)["tokens"] for split in SPLITS)) for tokens in sets]
        shown = (f"{train:,} tokens of {name} and {held_out:,} held out" for name, train, held_out in counts)
        self.progress.say("data: " + ", ".join(shown))

    def pretrain(self) -> None:
        batch = f"{self.config.batch.sequences} x {self.config.data.seq_len}"
        processes = f"{self.workshop.processes} process{'es' if self.workshop.processes > 1 else ''}"
        self.progress.say(
            f"pre-training: {self.config.length} of {batch} tokens in {processes}; "
            "Ctrl-C saves a checkpoint to go on from"
        )
        self.workshop.run("pretrain", "pretrain", self.config)

    def check(self) -> None:
        """Raises UserError where training has not helped: nothing after it would make sense."""
        records = read_metrics(self.out / "pretrain" / METRICS)
        for name, values in validations(records).items():
            before, after = values[0][1], values[-1][1]
            if not after < before:
                raise UserError(
                    f"it has not learnt: held-out {name} takes {after:.3f} bits per byte after training and took "
                    f"{before:.3f} before; see {self.out / 'pretrain' / METRICS}, and try another --seed with another "
                    "--out"
                )


def settings(workshop: Workshop) -> PretrainConfig:
    """The shipped settings with their paths put under OUT."""
    config = cast(PretrainConfig, workshop.settings("pretrain", "quickstart"))

    def moved(folder: str) -> str:
        return str(workshop.out / "data" / Path(folder).name)

    data = config.data.to_dict() | {
        "sources": {moved(folder): weight for folder, weight in config.data.sources.items()},
        "validation": {name: moved(folder) for name, folder in config.data.validation.items()},
    }
    paths = {"run_dir": str(workshop.out / "pretrain"), "tokenizer": str(workshop.out / "tokenizer")}
    return cast(
        PretrainConfig,
        workshop.settings("pretrain", "quickstart", **paths, data=data, seed=workshop.seed),
    )


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
