"""What a user installs: the wheel, its requirements, and the pinned versions."""

import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOT_SHIPPED = {"tests", "benchmarks", "docs", "build", "dist", "runs", "dsv3.egg-info"}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shipped_files() -> set[str]:
    """Every file of every package of the source tree, by its name in the wheel; of C++, what is built."""

    def walk(folder: Path) -> set[Path]:
        files = {file for file in folder.iterdir() if file.is_file()}
        for child in folder.iterdir():
            if child.is_dir() and not child.name.startswith((".", "__")) and child.name not in NOT_SHIPPED:
                files |= walk(child)
        return files

    in_packages = {file for file in walk(ROOT) if file.parent != ROOT or file.suffix == ".py"}
    in_packages -= {file for file in (ROOT / "backends" / "cpu" / "native").iterdir() if file.suffix in (".cpp", ".h")}
    return {f"dsv3/{file.relative_to(ROOT)}" for file in in_packages} - {"dsv3/setup.py"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build folder left in the source tree would leak old modules into the wheel."""
    place = tmp_path_factory.mktemp("wheel")
    tree = place / "tree"
    shutil.copytree(ROOT, tree, ignore=lambda _, names: [n for n in names if n.startswith(".") or n in NOT_SHIPPED])
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    run(*pip_wheel, "-w", place, tree, cwd=place)
    return next(place.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_package_whole_and_nothing_else(wheel: Path):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == shipped_files()


@pytest.mark.slow
def test_the_wheel_in_an_empty_environment_runs_doctor(wheel: Path, tmp_path: Path):
    place = tmp_path / "env"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # Torch and the other dependencies from here. A path named in a .pth brings no .pth files of its own, so the
    # editable install of this environment stays out.
    (packages / "dependencies.pth").write_text(str(Path(metadata.distribution("torch").locate_file("")).resolve()))
    pip = [sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-index"]
    run(*pip, "--ignore-installed", wheel, cwd=tmp_path)
    assert run(python, "-c", "import dsv3; print(dsv3.__file__)", cwd=tmp_path).startswith(str(packages))
    assert "* cpu " in run(place / "bin" / "dsv3", "doctor", "--backend", "cpu", cwd=tmp_path)
    assert "specification" in run(python, "-m", "dsv3", "doctor", "--ops", "--backend", "cpu", cwd=tmp_path)


@pytest.mark.parametrize("extra", ["cuda", "rocm", "ascend", "tensorrt-llm"])
@pytest.mark.parametrize("platform", [("win32", "AMD64"), ("darwin", "arm64")])
def test_packages_of_a_vendor_are_asked_for_only_where_they_exist(extra: str, platform: tuple[str, str]):
    environment = {"sys_platform": platform[0], "platform_machine": platform[1]}
    for text in PROJECT["project"]["optional-dependencies"][extra]:
        requirement = Requirement(text)
        assert requirement.marker is not None, text
        assert not requirement.marker.evaluate(environment), text


def test_a_plain_install_asks_for_six_portable_packages():
    names = {Requirement(text).name for text in PROJECT["project"]["dependencies"]}
    assert names == {"torch", "numpy", "safetensors", "tokenizers", "rich", "msgspec"}


def needed(requirements: list[str]) -> set[str]:
    """Names of all distributions that `requirements` pull in, as installed here."""
    found: set[tuple[str, str]] = set()

    def visit(text: str) -> None:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in found:
                continue
            found.add((name, extra))
            for child in metadata.requires(name) or []:
                marker = Requirement(child).marker
                if marker is None or marker.evaluate({"extra": extra}):
                    visit(child)

    for text in requirements:
        visit(text)
    return {name for name, _ in found} - {"dsv3"}


@pytest.mark.parametrize("extra", ["dev", pytest.param("peers", marks=pytest.mark.peer)])
def test_the_constraints_pin_everything_that_development_pulls_in(extra: str):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") and "+" not in str(pin.specifier) for pin in pins)
    # What an accelerator build of torch brings is pinned by torch itself.
    of_torch = ("nvidia-", "cuda-", "triton", "pytorch-triton")
    wanted = {name for name in needed([f"dsv3[{extra}]"]) if not name.startswith(of_torch)}
    assert wanted - {canonicalize_name(pin.name) for pin in pins} == set()
