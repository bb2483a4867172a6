"""What GRPO finds to choose in the quickstart: its cold start and reinforcement again, with other shares of the styles.

    make quickstart
    python benchmarks/quickstart_styles.py runs/quickstart runs/all-steps --styles 0 1 0     # direct, steps, checked

Starts from the base model of the finished quickstart in the first folder, with its seed and processes; leaves the runs
in the second one. Prints accuracies on the held-out problems.
"""

import argparse
import json
import shutil
from pathlib import Path

from contest import machine

import dsv3.backends  # noqa: F401  (it registers them)
from dsv3.quickstart import arithmetic
from dsv3.quickstart.folder import FACTS, Folder
from dsv3.quickstart.reasoning import Reasoning
from dsv3.quickstart.workshop import Workshop, one_thread, train_in_processes
from dsv3.training.launch import processes_for_this_machine
from dsv3.training.progress import Progress

KEPT = ("pretrain", "tokenizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--styles", type=float, nargs=3, default=(0.0, 1.0, 0.0), metavar="SHARE")
    options = parser.parse_args()
    arithmetic.STYLES = dict(zip(arithmetic.STYLES, options.styles, strict=True))
    seed = json.loads((options.quickstart / FACTS).read_text(encoding="utf-8"))["seed"]
    progress = Progress()
    with Folder(options.out.absolute(), seed, progress.say) as folder:
        for name in KEPT:
            shutil.copytree(options.quickstart / name, folder.path / name, dirs_exist_ok=True)
        processes = processes_for_this_machine()
        stages = Reasoning(Workshop(folder, progress, seed, processes, "cpu", train_in_processes))
        for stage in (stages.tasks, stages.sft, stages.grpo):
            stage()
        with one_thread():
            for name in ("sft", "grpo"):
                stages.measure(name)
                found = json.loads(stages.measured(name).read_text(encoding="utf-8"))
                print(
                    f"{name}: greedy {found['greedy']['accuracy']:.1%}, T = 1 {found['temperature 1']['accuracy']:.1%}"
                )
    print(machine())


if __name__ == "__main__":
    main()
