"""Where the data of a task lies, among what --data names: folders that hold many sets, and places of single ones."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from .reading import ENDINGS, PACKED

# Names under which the sets are published, besides our own; compared without case, dashes, dots and underscores.
ALIASES = {
    "math": ("hendrycksmath", "competitionmath"),
    "aime24": ("aime2024",),
    "aime25": ("aime2025",),
    "gpqa": ("gpqadiamond",),
    "ceval": ("cevalexam",),
    "ifeval": ("ifevalinputdata", "inputdata"),
    "drop": ("dropdataset", "dropdatasetdev", "dropv0dev"),
    "bbh": ("bigbenchhard",),
    "livecodebench": ("lcb", "codegenerationlite", "codegeneration"),
    "pile": ("piletest",),
}


@dataclass(frozen=True)
class Places:
    """folders: hold a file or a folder for each task, by its name. single: task -> its own place."""

    folders: tuple[Path, ...] = ()
    single: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: Iterable[str]) -> "Places":
        """What `--data DIR` and `--data task=path` say. UserError where something is not there."""
        folders, single = [], {}
        for text in given:
            name, equals, path = text.partition("=")
            if equals and "/" not in name and not Path(text).exists():
                single[name] = Path(path)
            elif Path(text).is_dir():
                folders.append(Path(text))
            else:
                raise UserError(f"--data {text}: no such folder; give a folder of data sets, or TASK=PATH")
        return cls(tuple(folders), single)

    def find(self, task: str) -> Path | None:
        """The place of a task's data; None where there is none. A single place counts as found, there or not."""
        if task in self.single:
            return self.single[task]
        wanted = {_plain(task), *ALIASES.get(task, ())}
        for folder in self.folders:
            for entry in sorted(folder.iterdir()):
                if _plain(_stem(entry)) in wanted:
                    return entry
        return None

    def need(self, task: str, files: str) -> Path:
        """The same; UserError, with the files that are expected, where there is none."""
        place = self.find(task)
        if place is None:
            where = " or ".join(str(folder / task) for folder in self.folders)
            there = f"not at {where}; put it there, or give" if where else "missing; give"
            raise UserError(f"{task}: the data is {there} --data {task}=PATH, where PATH is {files}")
        return place

    def unknown(self, tasks: Sequence[str]) -> list[str]:
        """Names of single places that no task has."""
        return [name for name in self.single if name not in tasks]


def _stem(entry: Path) -> str:
    name = entry.name.lower()
    for ending in (*PACKED, *ENDINGS):
        name = name.removesuffix(ending)
    return name


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
