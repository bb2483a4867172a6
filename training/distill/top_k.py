"""The teacher's likeliest tokens at every token of the traces, asked live or kept on disk.

    top_k/manifest.json         which traces, teacher and k they belong to
    top_k/00000.ids.npy         i32 [N, k]: for each learnt token of a block of samples, in their order
    top_k/00000.logp.npy        f32 [N, k]: natural logarithms of their probabilities, all tokens counted

Blocks appear one by one, each as a whole; a run that was interrupted goes on with those that are missing.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.files import atomic_write
from ...core.model import DeepseekV3
from ...core.tokenizer import Tokenizer
from ...errors import UserError
from ...parallel.data import DataParallel
from ..progress import Progress
from ..sft.packing import Indices, Packed, collate, passes
from ..sft.samples import Samples
from .divergence import top_k
from .students import head, hidden_states

BLOCK = 256  # samples


class TeacherTopK(Protocol):
    """Where the teacher's probabilities come from."""

    def at(self, chosen: Indices, packed: Packed) -> tuple[Tensor, Tensor]:
        """ids i32 and log-probabilities f32, [S, k] each, at the S learnt tokens of the samples `chosen`, which
        `packed` holds in this order."""


class LiveTopK:
    """Asks the teacher."""

    def __init__(self, teacher: DeepseekV3, tokenizer: Tokenizer, k: int) -> None:
        self.teacher, self.tokenizer, self.k = teacher, tokenizer, k

    @torch.no_grad()
    def at(self, chosen: Indices, packed: Packed) -> tuple[Tensor, Tensor]:
        return top_k(hidden_states(self.teacher, packed), head(self.teacher, self.tokenizer), self.k)


class StoredTopK:
    """Reads what `store` wrote. losses: learnt tokens of every sample."""

    def __init__(self, folder: Path, losses: Indices, device: torch.device) -> None:
        self.folder, self.losses, self.device = folder, losses, device
        self._blocks: dict[int, tuple[NDArray[np.int32], NDArray[np.float32]]] = {}

    def at(self, chosen: Indices, packed: Packed) -> tuple[Tensor, Tensor]:
        ids, values = list[NDArray[np.int32]](), list[NDArray[np.float32]]()
        for sample in chosen.tolist():
            block, place = divmod(sample, BLOCK)
            if block not in self._blocks:
                names = [self.folder / f"{block:05d}.{kind}.npy" for kind in ("ids", "logp")]
                self._blocks[block] = np.load(names[0], mmap_mode="r"), np.load(names[1], mmap_mode="r")
            first = int(self.losses[block * BLOCK : block * BLOCK + place].sum())
            rows = slice(first, first + int(self.losses[sample]))
            ids.append(self._blocks[block][0][rows])
            values.append(self._blocks[block][1][rows])
        stacked = torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(values))
        return stacked[0].to(self.device), stacked[1].to(self.device)


def store(
    folder: Path,
    source: LiveTopK,
    samples: Samples,
    identity: dict[str, Any],
    budget: int,
    parallel: DataParallel,
    progress: Progress,
) -> StoredTopK:
    """Ask the teacher about all samples that `folder` does not know yet, `budget` tokens at a time.

    identity: of traces and teacher; UserError where the folder belongs to others.
    """
    _claim(folder, json.loads(json.dumps(identity | {"k": source.k})), parallel)
    blocks = range(-(-len(samples) // BLOCK))
    missing = parallel.broadcast_object([b for b in blocks if not (folder / f"{b:05d}.ids.npy").exists()])
    mine = [missing[i] for i in parallel.share(len(missing))]
    for number, block in enumerate(mine, 1):
        chosen = np.arange(block * BLOCK, min((block + 1) * BLOCK, len(samples)))
        ids, values = _ask(source, samples, chosen, budget, parallel.device)
        for kind, array in (("logp", values), ("ids", ids)):  # the one that says "done" last
            with atomic_write(folder / f"{block:05d}.{kind}.npy") as file:
                np.save(file, array)
        progress.show(f"the teacher's probabilities: {number:,} of {len(mine):,} blocks", final=number == len(mine))
    parallel.barrier()
    return StoredTopK(folder, samples.losses, parallel.device)


def _ask(
    source: LiveTopK, samples: Samples, chosen: Indices, budget: int, device: torch.device
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for part in passes(chosen, samples.lengths, budget):
        packed = collate(samples, part, np.zeros(len(part))).to(device)
        ids, values = source.at(part, packed)
        counts = samples.losses[part].tolist()
        pieces = zip(ids.cpu().split(counts), values.cpu().split(counts), strict=True)
        found |= dict(zip(part.tolist(), pieces, strict=True))
    ordered: Sequence[tuple[Tensor, Tensor]] = [found[int(sample)] for sample in chosen]
    return torch.cat([ids for ids, _ in ordered]).numpy(), torch.cat([values for _, values in ordered]).numpy()


def _claim(folder: Path, identity: dict[str, Any], parallel: DataParallel) -> None:
    """Note whose probabilities a folder holds, or see that they are these."""
    failed = None
    if parallel.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "manifest.json"
        if not path.exists():
            with atomic_write(path, "w") as file:
                json.dump(identity, file, indent=1)
        elif json.loads(path.read_text(encoding="utf-8")) != identity:
            failed = f"{folder} holds probabilities of another teacher, of other traces or for another k: remove it"
    if failed := parallel.broadcast_object(failed):
        raise UserError(failed)
