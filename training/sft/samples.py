"""The samples of a run: conversations encoded once, kept under the run's folder, and read through memory maps.

    samples/manifest.json       what they were made from, and what became of each set's rows
    samples/train.tokens.bin    the tokens of all samples end to end, u32
    samples/train.loss.bin      a byte for each: 1 where it is to be learnt
    samples/train.lengths.npy   [N, 2] i64: tokens of each sample, and how many of them are to be learnt
    samples/NAME.*              the same for each validation set

Process 0 encodes and the others wait for it, told of its progress so that no timeout strikes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from ...core.files import atomic_directory
from ...errors import UserError
from ...parallel.data import DataParallel
from ..chat_data import ChatRow, Example, data_files, load_rows
from ..data.order import stream_key, uniform
from ..data.sources import file_stamps
from ..progress import Progress
from .config import HELD_OUT, SftDataSection

VERSION = 1
OWNED = ("*.bin", "*.npy", "manifest.json")
ROWS_AT_ONCE = 2000  # between two signs of life


class Encoder(Protocol):
    """Turns a conversation into samples. context: tokens that the model can take; fingerprint: of all that the samples
    follow from besides the conversation."""

    tokenizer: Any
    context: int
    fingerprint: str

    def encode(self, row: ChatRow) -> list[Example]: ...


class Samples:
    """A set of samples on disk. lengths, losses: i64 [N], tokens of each, and how many of them are learnt."""

    def __init__(self, folder: Path, name: str, record: dict[str, Any]):
        self.name, self.record = name, record
        table = np.load(folder / f"{name}.lengths.npy")
        self.lengths, self.losses = table[:, 0], table[:, 1]
        self._starts = np.concatenate(([0], np.cumsum(self.lengths)))
        self._tokens: NDArray[np.uint32] = _map(folder / f"{name}.tokens.bin", np.dtype("<u4"))
        self._loss: NDArray[np.uint8] = _map(folder / f"{name}.loss.bin", np.dtype("u1"))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens and loss mask of a sample."""
        span = slice(int(self._starts[index]), int(self._starts[index + 1]))
        return self._tokens[span].astype(np.int64), self._loss[span].astype(bool)

    def describe(self) -> str:
        """What became of the rows: nothing that was dropped or cut goes unsaid."""
        counts = Counter(self.record["counts"])
        tokens, learnt = int(self.lengths.sum()), int(self.losses.sum())
        lines = [
            f"{self.name}: {counts['rows']:,} conversations, {len(self):,} samples, {tokens:,} tokens, "
            f"{learnt / max(1, tokens):.0%} of them learnt"
        ]
        if len(self):
            lines.append(f"lengths: median {np.median(self.lengths):,.0f}, longest {self.lengths.max():,}")
        if counts["overlong"]:
            lost = f", {counts['lost']:,} of them before anything to learn" if counts["lost"] else ""
            lines.append(f"{counts['overlong']:,} longer than data.seq_len were {self.record['overlong']}{lost}")
        if counts["empty"]:
            lines.append(f"{counts['empty']:,} conversations had nothing to learn")
        return "; ".join(lines)


@dataclass(frozen=True)
class Recipe:
    """What samples are made from: files, encoder, and the settings that matter."""

    data: SftDataSection
    encoder: Encoder
    seed: int

    def key(self) -> str:
        """Changes when the samples would."""
        data = self.data
        sets = {"train": data.train, **{name: (place,) for name, place in data.validation.items()}}
        stamps = {name: file_stamps(Path.cwd(), data_files(places)) for name, places in sets.items()}
        settings = [data.seq_len, data.overlong, data.held_out, self.seed if data.held_out else 0]
        return hashlib.sha256(json.dumps([VERSION, stamps, self.encoder.fingerprint, settings]).encode()).hexdigest()


def prepare_samples(
    recipe: Recipe, run_dir: Path, parallel: DataParallel, progress: Progress
) -> tuple[dict[str, Samples], str]:
    """The sets of a run by name, "train" first, and the SHA-256 of their contents. Encodes them where they are not
    there yet, or files and settings have changed.

    UserError on every process for rows that are none, and where nothing is left to learn.
    """
    if not recipe.data.train:
        raise UserError("data.train is empty: name files of conversations (.jsonl, .parquet), or folders of them")
    folder = run_dir / "samples"
    work = _work(recipe, folder, progress) if parallel.is_main else None
    status = ""
    while status != "done":
        if work is not None:
            try:
                status = next(work, "done")
            except UserError as error:
                status = f"error: {error}"
        status = parallel.broadcast_object(status)
        if status.startswith("error: "):
            raise UserError(status.removeprefix("error: "))
    manifest = _manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} is not visible to every process: put run_dir on a shared file system")
    sets = {name: Samples(folder, name, record) for name, record in manifest["sets"].items()}
    for samples in sets.values():
        progress.say(samples.describe())
        if not len(samples):
            raise UserError(f"{samples.name}: no sample is left to learn from ({samples.describe()})")
    return sets, manifest["sha256"]


def _work(recipe: Recipe, folder: Path, progress: Progress) -> Iterator[str]:
    key, known = recipe.key(), _manifest(folder)
    if known is not None and known["key"] == key:
        return
    data = recipe.data
    with ExitStack() as stack:
        place = stack.enter_context(atomic_directory(folder, OWNED))
        names = ["train", *([HELD_OUT] if data.held_out else []), *data.validation]
        writers = {name: stack.enter_context(_Writer(place, name, data)) for name in names}
        done = 0
        for name in ("train", *data.validation):
            sources = data.train if name == "train" else data.validation[name]
            for number, row in enumerate(load_rows(sources)):
                aside = name == "train" and data.held_out > 0 and _is_held_out(number, data.held_out, recipe.seed)
                writers[HELD_OUT if aside else name].add(recipe.encoder.encode(row))
                done += 1
                if done % ROWS_AT_ONCE == 0:
                    progress.show(f"encoding conversations: {done:,}")
                    yield "encoding"
        records = {name: writer.finish() for name, writer in writers.items()}
        digest = hashlib.sha256(json.dumps({name: record["sha256"] for name, record in records.items()}).encode())
        manifest = {"key": key, "sha256": digest.hexdigest(), "sets": records}
        (place / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _is_held_out(number: int, part: float, seed: int) -> bool:
    return bool(uniform(np.array([number], dtype=np.uint64), stream_key(seed, "sft", HELD_OUT))[0] < part)


class _Writer:
    """Writes one set as its samples come."""

    def __init__(self, folder: Path, name: str, data: SftDataSection):
        self._data, self._counts = data, Counter[str]()
        self._lengths: list[tuple[int, int]] = []
        self._digest = hashlib.sha256()
        self._table = folder / f"{name}.lengths.npy"
        self._paths = [folder / f"{name}.{kind}.bin" for kind in ("tokens", "loss")]
        self._stack, self._files = ExitStack(), list[BinaryIO]()

    def __enter__(self) -> "_Writer":
        self._files = [self._stack.enter_context(path.open("wb")) for path in self._paths]
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, examples: list[Example]) -> None:
        """The samples of one conversation."""
        self._counts["rows"] += 1
        written = overlong = 0
        for ids, mask in examples:
            if len(ids) > self._data.seq_len:
                overlong += 1
                if self._data.overlong == "drop":
                    continue
                ids, mask = ids[: self._data.seq_len], mask[: self._data.seq_len]
            if any(mask[1:]):  # nothing predicts the first token
                self._write(np.array(ids, dtype="<u4"), np.array(mask, dtype="u1"))
                written += 1
            else:  # it was cut before its first reply
                self._counts["lost"] += 1
        self._counts["overlong"] += overlong
        self._counts["empty"] += not written and not overlong

    def _write(self, ids: NDArray[np.uint32], mask: NDArray[np.uint8]) -> None:
        mask[0] = 0
        for file, written in zip(self._files, (ids.tobytes(), mask.tobytes()), strict=True):
            file.write(written)
            self._digest.update(written)
        self._lengths.append((len(ids), int(mask.sum())))

    def finish(self) -> dict[str, Any]:
        """Complete the files; what the manifest says of them."""
        for file in self._files:
            file.flush()
        table = np.array(self._lengths, dtype="<i8").reshape(-1, 2)
        np.save(self._table, table)
        self._digest.update(table.tobytes())
        overlong = "dropped" if self._data.overlong == "drop" else "cut"
        return {"sha256": self._digest.hexdigest(), "counts": dict(self._counts), "overlong": overlong}


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)
