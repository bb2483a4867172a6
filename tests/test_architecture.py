"""The house's arrows: ops <- backends; ops <- core <- parallel <- wings <- quickstart; all <- command line. bench
measures ops and backends. Read off the sources."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WINGS = ("training", "serving", "export", "evaluation")
MAY_IMPORT = {
    "errors": set(),
    "grading": {"errors", "grading"},
    "ops": {"errors", "ops"},
    "backends": {"errors", "ops", "backends"},
    "core": {"errors", "ops", "core"},
    "parallel": {"errors", "ops", "core", "parallel"},
    **{wing: {"errors", "grading", "ops", "core", "parallel", wing} for wing in WINGS},
    "bench": {"errors", "ops", "backends", "core", "bench"},
    "quickstart": {"errors", "grading", "ops", "core", "parallel", "training", "evaluation", "quickstart"},
}


def sources() -> list[Path]:
    """Every module of the package below the command line."""
    folders = [file for part in MAY_IMPORT for file in sorted((ROOT / part).rglob("*.py"))]
    return [ROOT / "errors.py", *folders]


def imports(source: str, module: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Absolute names of what `source`, the file of `module`, imports: ("dsv3", "ops", "mla"), ("torch",), ...

    module: path parts of the file below the root, e.g. ("core", "mla.py").
    """
    package = ("dsv3", *module[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = (*base, *(node.module or "").split(".")) if node.module else base
            for alias in node.names:
                yield (*stem, alias.name)


def wrong_arrows(source: str, module: tuple[str, ...]) -> list[str]:
    part = module[0].removesuffix(".py")
    targets = {name[1] for name in imports(source, module) if name[0] == "dsv3" and len(name) > 1}
    return sorted(targets - MAY_IMPORT[part])


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below_it(file: Path):
    assert wrong_arrows(file.read_text(encoding="utf-8"), file.relative_to(ROOT).parts) == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        (("core", "mla.py"), "from ..backends import cpu", ["backends"]),
        (("core", "mla.py"), "from .. import cli", ["cli"]),
        (("core", "mla.py"), "def f():\n    from ..training.data import pack", ["training"]),
        (("backends", "cpu", "mla.py"), "from ...core.mla import MLA", ["core"]),
        (("backends", "cpu", "mla.py"), "from ...ops import mla\nfrom .gemm import f\nfrom .. import Backend", []),
        (("training", "pretrain.py"), "from ..serving import engine\nimport dsv3.export.hf", ["export", "serving"]),
        (("training", "data", "pack.py"), "from ...core.files import atomic_write\nfrom ..config import Run", []),
    ],
)
def test_a_wrong_arrow_is_seen_in_every_way_to_write_an_import(module: tuple[str, ...], source: str, wrong: list[str]):
    assert wrong_arrows(source, module) == wrong


def test_the_ground_floor_needs_torch_alone():
    for file in sorted((ROOT / "ops").rglob("*.py")):
        names = {name[0] for name in imports(file.read_text(encoding="utf-8"), file.relative_to(ROOT).parts)}
        assert names - set(sys.stdlib_module_names) <= {"torch", "dsv3"}, file


def test_no_module_imports_the_package_by_its_own_name():
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.split(".")[0] == "dsv3"], f"{file}:{node.lineno}"
