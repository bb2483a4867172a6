"""What `dsv3 train` runs."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UserError
from .settings import Section

SHIPPED = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Stage:
    """A kind of training: where its settings class and the function that runs it stand. Imported when asked for."""

    settings: str  # "module:class" below this package
    function: str  # "module:function"

    def config(self) -> type[Section]:
        cls: type[Section] = _named(self.settings)
        return cls

    def run(self, config: Section, backend: str) -> Path | None:
        """The directory of the finished model, or None where it was asked to stop."""
        function: Callable[[Section, str], Path | None] = _named(self.function)
        return function(config, backend)


def _named(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(f".{module}", __package__), name)


STAGES = {
    "pretrain": Stage("config:PretrainConfig", "pretrain:pretrain"),
    "sft": Stage("sft.config:SftConfig", "sft.run:sft"),
    "grpo": Stage("grpo.config:GrpoConfig", "grpo.run:grpo"),
    "distill": Stage("distill.config:DistillConfig", "distill.run:distill"),
    "r1": Stage("r1.config:R1Config", "r1.run:r1"),
}


def find_config(kind: str, name: str) -> Path:
    """A file, or one of the shipped configurations by its name without ".toml"."""
    path, shipped = Path(name), SHIPPED / kind / f"{name}.toml"
    if path.is_file() or not shipped.is_file():
        if not path.exists() and path.suffix != ".toml":
            names = ", ".join(sorted(file.stem for file in (SHIPPED / kind).glob("*.toml")))
            raise UserError(f"{name}: no such file, and no shipped configuration ({names})")
        return path
    return shipped


def run(args: argparse.Namespace) -> int:
    """`dsv3 train STAGE CONFIG [key=value ...]`: 0 when finished or stopped politely with a checkpoint."""
    stage = STAGES[args.stage]
    config = stage.config().load(find_config(args.stage, args.config), args.overrides)
    if args.dump_config:
        print(config.to_toml(), end="")
        return 0
    stage.run(config, args.backend)
    return 0
