"""A distillation small enough for tests: questions about sums, teachers that know the answers or not, settings."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv3.core.completer import Conversation, Reply, split_reply
from dsv3.core.generate import SamplingParams
from dsv3.parallel.data import DataParallel
from dsv3.training.distill.config import DistillConfig
from dsv3.training.distill.run import collect


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def questions(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {n} plus {n + 1}?", "answer": str(2 * n + 1), "topic": "sums"} for n in range(count)]


def sum_of(question: str) -> int:
    words = question.removesuffix("?").split()
    return int(words[2]) + int(words[4])


def thinking(answer: object, thought: str = "I add the two numbers") -> str:
    return f"<think>\n{thought}\n</think>\n\n{answer}"


class Teacher:
    """A completer that writes what `write(question, seed)` gives, alone or with a finish reason."""

    name = "tutor"

    def __init__(self, write: Callable[[str, int], Any]) -> None:
        self.write, self.asked = write, list[tuple[str, int]]()

    def complete(
        self,
        conversations: Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams],
        on_reply: Callable[[int, Reply], None] | None = None,
    ) -> list[Reply]:
        replies = []
        assert not isinstance(params, SamplingParams)
        for index, (conversation, wanted) in enumerate(zip(conversations, params, strict=True)):
            question = conversation[-1]["content"]
            assert wanted.seed is not None
            self.asked.append((question, wanted.seed))
            written = self.write(question, wanted.seed)
            text, finish = written if isinstance(written, tuple) else (written, "stop")
            replies.append(Reply(text, *split_reply(text), finish, len(text.split())))
            if on_reply is not None:
                on_reply(index, replies[-1])
        return replies


def config_of(folder: Path, prompts: Path, **tables: Any) -> DistillConfig:
    """Verified samples of `served` at a URL that nobody asks, unless `tables` say otherwise."""
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "stages": [],
        "data": {"prompts": [str(prompts)]},
        "teacher": {"endpoint": "http://127.0.0.1:9/v1", "served_model": "tutor", "concurrency": 2},
        "sampling": {"samples": 2, "max_tokens": 64},
        "rewards": [{"name": "accuracy_exact", "options": {"whole": True}}],
    }
    return DistillConfig.from_dict(values | tables)


def run(config: DistillConfig, teacher: Teacher | None = None) -> dict[str, Any]:
    return collect(config, DataParallel(), teacher)


def traces(config: DistillConfig) -> list[dict[str, Any]]:
    return read_rows(Path(config.run_dir) / "traces.jsonl")


if __name__ == "__main__":  # the settings of a TOML file, in a process that a test can kill
    run(DistillConfig.load(sys.argv[1]))
