"""What every stage of a quickstart works with: its folder, its settings, and how a run of training is started."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.files import atomic_write
from ..training.launch import launch
from ..training.progress import Progress
from ..training.settings import Section
from ..training.verbs import SHIPPED, STAGES
from .folder import Folder

# kind of training ("pretrain", "sft", ...), settings file, processes, backend, folder
Train = Callable[[str, Path, int, str, Folder], None]


def train_in_processes(kind: str, settings: Path, processes: int, backend: str, folder: Folder) -> None:
    """A run of training in processes of its own, which keep the folder locked while they live."""
    launch(["train", kind, str(settings), "--backend", backend], processes, keep_open=[folder.lock])


@contextmanager
def one_thread() -> Iterator[None]:
    """Operators of this size are slower on several threads than on one, many times so beside another busy program."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class Workshop:
    """See the module. overrides: kind of training -> `key=value` over the shipped settings."""

    folder: Folder
    progress: Progress
    seed: int
    processes: int
    backend: str
    train: Train
    overrides: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.folder.path

    def settings(self, kind: str, shipped: str, **fields: Any) -> Section:
        """The shipped settings of `kind` with the overrides, and with `fields` over both."""
        cls = STAGES[kind].config()
        config = cls.load(SHIPPED / kind / f"{shipped}.toml", self.overrides.get(kind, ()))
        return cls.from_dict(config.to_dict() | fields)

    def run(self, kind: str, name: str, config: Section) -> None:
        """Train by `config`, whose run_dir is OUT/name; KeyboardInterrupt where it was asked to stop."""
        settings = self.out / f"{name}.toml"
        with atomic_write(settings, "w") as file:
            file.write(config.to_toml())
        self.train(kind, settings, self.processes, self.backend, self.folder)
        if not (self.out / name / "model").exists():  # by a signal that did not reach us
            raise KeyboardInterrupt
