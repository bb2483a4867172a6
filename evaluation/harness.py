"""lm-eval's tasks on our models: its prompts, data and metrics, our likelihoods and replies.

lm-eval runs in this process. Every score and reply is kept as it comes, so an interrupted run goes on where it was.
"""

import functools
import json
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist

from ..core.files import atomic_write
from ..errors import UserError
from .harness_model import NO_LIKELIHOODS, model_class
from .harness_results import build
from .published import HARNESS_CHAT, HARNESS_PROTOCOL, LM, benchmark_of
from .reading import library
from .results import Result
from .subject import Progress, Subject
from .tasks import TASKS

FEWSHOT_SEED = 1234  # lm-eval's own: the same shots as in everybody's numbers


class Silent:
    """Progress for callers that want none."""

    def show(self, line: str, final: bool = False) -> None: ...
    def say(self, text: str) -> None: ...


def run_harness(
    subject: Subject,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    max_tokens: int | None = None,
    chat: bool | None = None,
    thinks: bool = False,
    seed: int = 0,
    out: Path | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """A result for each of lm-eval's tasks or groups (for each task of a tag).

    tasks: names, with or without "lm:". include_path: folder of task files (YAML) of one's own. limit: the first items
    only. shots, max_tokens: instead of what the task says; lm-eval keeps a task at 0 shots that says 0. chat: ask in
    conversations; None: where the model can do nothing else. thinks: replies begin with a thought; lm-eval judges what
    is behind it. seed: of replies that are sampled. out: where replies/ and graded/ are kept, None for nowhere.

    With torch.distributed every process takes its share of the requests, and process 0 returns the results, the others
    an empty list. Raises UserError where lm-eval is missing, a task is unknown or cannot be loaded, or needs what the
    model cannot do.
    """
    names = [name.removeprefix(LM) for name in tasks]
    lm_eval = library("lm_eval", ", ".join(LM + name for name in names))
    talking = subject.likelihood is None if chat is None else chat
    model = model_class()(subject, talking, thinks, max_tokens, seed, progress or Silent())
    results = []
    with _quiet():
        manager = _Tasks(include_path)
        for name in names:
            loaded = manager.load(name)
            for task in loaded["tasks"].values():
                _prepare(name, task, shots, talking)
            path = None if out is None else out / "replies" / f"lm.{_file(name)}{_rank_suffix()}.jsonl"
            with model.keeping(name, path):
                found = lm_eval.evaluate(
                    lm=model,
                    task_dict=loaded,
                    limit=limit,
                    bootstrap_iters=0,
                    log_samples=True,
                    apply_chat_template=talking,
                    fewshot_as_multiturn=talking,
                )
            if found is not None:
                results += build(name, found, model.account, HARNESS_CHAT if talking else HARNESS_PROTOCOL)
                if out is not None:
                    _keep(out / "graded" / f"lm.{_file(name)}.jsonl", found["samples"])
    return results


class _Tasks:
    """Finds tasks. Reading all of lm-eval's takes seconds, so it is done only for names that are not the user's."""

    def __init__(self, include_path: Path | None) -> None:
        if include_path is not None and not include_path.is_dir():
            raise UserError(f"{include_path}: no such folder; give one with lm-eval's task files (YAML)")
        self.include_path = include_path
        self._all: Any = None

    def _manager(self, whole: bool) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=self.include_path, include_defaults=whole)

    def load(self, name: str) -> dict[str, Any]:
        """lm-eval's {"tasks", "groups"} for a name."""
        if self.include_path is not None and self._all is None:
            own = self._manager(whole=False)
            if name in own.all_tasks:
                try:
                    return self._load(own, name)
                except KeyError:  # a group of the user's with tasks of lm-eval's
                    pass
        if self._all is None:
            self._all = self._manager(whole=True)
        if name not in self._all.all_tasks:
            raise UserError(
                f"{LM}{name}: lm-eval has no such task; `lm-eval ls tasks` names its own, --harness-path adds a folder "
                "of yours"
            )
        try:
            return self._load(self._all, name)
        except KeyError as error:
            raise _unusable(name, error) from error

    def _load(self, manager: Any, name: str) -> dict[str, Any]:
        state = random.getstate()
        random.seed(0)  # some tasks shuffle their choices as they are loaded; lm-eval's command line seeds so too
        try:
            found: dict[str, Any] = manager.load([name])
            return found
        except KeyError:
            raise
        except Exception as error:  # whatever a task's file does
            raise _unusable(name, error) from error
        finally:
            random.setstate(state)


def _unusable(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    own = benchmark_of(LM + name)
    own = own if own in TASKS else name if name in TASKS else ""
    here = f"--tasks {own} --data DIR asks it without lm-eval, or " if own else ""
    return UserError(
        f"{LM}{name}: its data or code cannot be loaded here ({reason[:200]}); {here}write a task file with "
        "dataset_path: json and data_files of your own, and name its folder with --harness-path"
    )


def _prepare(name: str, task: Any, shots: int | None, talking: bool) -> None:
    """Refuse what cannot be asked, and settle the shots as lm-eval's own command line does."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"{LM}{name}: lm-eval runs its programs without a sandbox; use humaneval or mbpp, which have one"
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"{LM}{name}: asks about pictures, which the model cannot see")
    if talking and task.OUTPUT_TYPE != "generate_until":
        raise UserError(f"{LM}{name}: {NO_LIKELIHOODS.format('a conversation')}")
    said = task.get_config("num_fewshot")
    if shots is not None and said != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif said is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _keep(path: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    """What became of every item, for people who wonder about a number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        for task, rows in samples.items():
            for row in rows:
                metrics = {name: row[name] for name in row["metrics"]}
                kept = {"task": task, "item": row["doc_id"], "filter": row["filter"], "answer": row["filtered_resps"]}
                line = json.dumps(kept | {"target": row["target"]} | metrics, ensure_ascii=False, default=str)
                file.write(line.encode("utf-8", errors="replace").decode("utf-8") + "\n")


def _file(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)


def _rank_suffix() -> str:
    return f".{dist.get_rank()}" if dist.is_available() and dist.is_initialized() and dist.get_rank() else ""


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets without their own bars and remarks: they would tear our line of progress."""
    import lm_eval.api.task as task_module

    bars: ModuleType = library("datasets", "lm-eval").utils.logging
    logger = logging.getLogger("lm_eval")
    level, enabled, bar = logger.level, bars.is_progress_bar_enabled(), task_module.tqdm
    logger.setLevel(logging.ERROR)
    bars.disable_progress_bar()
    task_module.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        task_module.tqdm = bar
        if enabled:
            bars.enable_progress_bar()
