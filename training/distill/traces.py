"""From samples to what a student learns from.

traces.jsonl        OpenAI messages with reasoning_content, the prompt's columns, and where all of it is from
pass_rates.jsonl    every prompt with the share of its samples that are right
rl_prompts.jsonl    those of middling difficulty, for reinforcement learning
filter_report.json  how many samples stayed, and why the others did not
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...core.files import atomic_write
from ...errors import UserError
from ...grading.ngrams import NgramIndex
from ..data.records import RECORDS, read_records
from ..data.sources import files_below
from ..progress import Progress
from .config import DistillConfig
from .filters import Filter, Sample, is_right
from .prompts import Prompt, canonical, seeds
from .worklog import WorkLog

TRACES, PASS_RATES, RL_PROMPTS, REPORT = "traces.jsonl", "pass_rates.jsonl", "rl_prompts.jsonl", "filter_report.json"


def load_benchmarks(paths: Sequence[str], n: int) -> NgramIndex | None:
    """The texts of benchmark files, and of all files below a folder: JSON lines and parquet, every text in a row;
    anything else, each line."""
    if not paths:
        return None
    index = NgramIndex(n)
    for path in benchmark_files(paths):
        try:
            for where, text in _items(path):
                index.add(text, where)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"filter.benchmarks: cannot read {path}: {error}") from None
    return index


def benchmark_files(paths: Sequence[str]) -> list[Path]:
    places = [Path(name) for name in paths]
    return [file for place in places for file in (files_below(place) if place.is_dir() else [place])]


def _items(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of everything in a file."""
    if path.name.lower().endswith(RECORDS):
        for where, record in read_records(path):
            yield from ((where, text) for text in _texts(record))
        return
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            yield f"{path}, line {number}", line


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def clean(prompts: Sequence[Prompt], benchmarks: NgramIndex | None) -> tuple[list[Prompt], list[dict[str, str]]]:
    """The prompts that share no run of words with a benchmark; and those that do: id, source, words."""
    stay, dropped = list[Prompt](), list[dict[str, str]]()
    for prompt in prompts:
        hit = benchmarks.overlap(prompt.text) if benchmarks is not None else None
        if hit is None:
            stay.append(prompt)
        else:
            dropped.append({"prompt": prompt.id, "source": hit.source, "words": hit.ngram})
    return stay, dropped


class TraceWriter:
    """The filter stage of one distillation. teacher: what traces say about it."""

    def __init__(
        self,
        config: DistillConfig,
        prompts: Sequence[Prompt],
        contaminated: Sequence[Mapping[str, str]],
        teacher: Mapping[str, Any],
        benchmarks: NgramIndex | None,
    ) -> None:
        self.config, self.prompts, self.contaminated, self.teacher = config, prompts, contaminated, teacher
        self.directory = Path(config.run_dir)
        self.names = [section.name for section in config.rewards]
        self.filter = Filter(config.filter, self.names, benchmarks)
        self.sampling = {key: value for key, value in config.sampling.to_dict().items() if key != "samples"}

    def fingerprint(self, samples: WorkLog, scores: WorkLog) -> str:
        """Of all that the outcome follows from."""
        files: list[Any] = [[path.name, path.stat().st_size] for log in (samples, scores) for path in log.files()]
        stamps = [(path, path.stat()) for path in benchmark_files(self.config.filter.benchmarks)]
        files += [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stamps]
        parts = [self.config.filter.to_dict(), self.config.sampling.to_dict(), self.config.seed, self.names, files]
        rows = hashlib.sha256()
        for prompt in self.prompts:
            rows.update(canonical(prompt.row()))
        return hashlib.sha256(canonical([*parts, dict(self.teacher), rows.hexdigest()])).hexdigest()

    def is_done(self, fingerprint: str) -> bool:
        path = self.directory / REPORT
        there = all((self.directory / name).exists() for name in (TRACES, PASS_RATES, RL_PROMPTS, REPORT))
        return there and json.loads(path.read_text(encoding="utf-8"))["fingerprint"] == fingerprint

    def write(
        self, samples: WorkLog, scores: WorkLog, problems: Counter[str], fingerprint: str, progress: Progress
    ) -> dict[str, Any]:
        """Filter everything and write the four files; the report last, as it says that the others are whole."""
        rejected: Counter[str] = Counter()
        count = kept = middling = 0
        rates: list[float] = []
        found, judged = samples.places(), scores.places()
        with ExitStack() as stack:
            traces, all_rates, fit = (
                stack.enter_context(atomic_write(self.directory / name, "w"))
                for name in (TRACES, PASS_RATES, RL_PROMPTS)
            )
            for number, prompt in enumerate(self.prompts, 1):
                own = self._samples(prompt, samples, scores, found, judged)
                minimum = self.config.filter.minimum
                verdicts = [is_right(sample.finish_reason, sample.rewards, self.names, minimum) for sample in own]
                known = [verdict for verdict in verdicts if verdict is not None]
                rate = sum(known) / len(known) if known else None
                stay, reasons = self.filter.choose(own)
                for sample in stay:
                    traces.write(_line(self.trace(sample, rate, len(own))))
                row = {**prompt.row(), "pass_rate": rate, "samples": len(own), "right": sum(known)}
                all_rates.write(_line(row))
                low, high = self.config.filter.pass_rate
                if rate is not None:
                    rates.append(rate)
                    if low <= rate <= high:
                        fit.write(_line(row))
                        middling += 1
                count, kept, rejected = count + len(own), kept + len(stay), rejected + reasons
                progress.show(f"filtering: {number:,} of {len(self.prompts):,} prompts, {kept:,} traces")
        report = {
            "prompts": len(self.prompts),
            "prompts_contaminated": len(self.contaminated),
            "contaminated": list(self.contaminated),
            "samples": count,
            "kept": kept,
            "rejected": dict(rejected.most_common()),
            "pass_rate": {
                "mean": sum(rates) / len(rates) if rates else None,
                "prompts": len(rates),
                "never_right": sum(rate == 0 for rate in rates),
                "always_right": sum(rate == 1 for rate in rates),
                "rl_prompts": middling,
            },
            "reward_problems": dict(problems),
            "teacher": dict(self.teacher),
            "fingerprint": fingerprint,
        }
        with atomic_write(self.directory / REPORT, "w") as file:
            json.dump(report, file, indent=1, ensure_ascii=False)
        why = ", ".join(f"{reason} {n:,}" for reason, n in rejected.most_common()) or "none"
        progress.say(f"traces: {kept:,} of {count:,} samples kept; rejected: {why}")
        return report

    def _samples(
        self, prompt: Prompt, samples: WorkLog, scores: WorkLog, found: Mapping[Any, Any], judged: Mapping[Any, Any]
    ) -> list[Sample]:
        keys = [(prompt.id, s) for s in seeds(prompt.id, self.config.seed, self.config.sampling.samples)]
        keys = [key for key in keys if key in found]
        drawn = samples.read(found[key] for key in keys)
        known = {scores.key(r): r for r in scores.read(judged[key] for key in keys if key in judged)}
        result = []
        for key, record in zip(keys, drawn, strict=True):
            score = known.get(key, {"total": None, "rewards": {}})
            reply = (record["seed"], record["text"], record["finish_reason"], record["tokens"])
            result.append(Sample(prompt, *reply, score["total"], score["rewards"]))
        return result

    def trace(self, sample: Sample, pass_rate: float | None, samples: int) -> dict[str, Any]:
        """A row of chat data that says where it is from."""
        reply: dict[str, Any] = {"role": "assistant", "content": sample.answer}
        if sample.thought:
            reply["reasoning_content"] = sample.thought
        columns = {key: value for key, value in sample.prompt.columns.items() if key not in ("id", "provenance")}
        provenance = {
            **self.teacher,
            "prompt": sample.prompt.id,
            "seed": sample.seed,
            "sampling": self.sampling,
            "tokens": sample.tokens,
            "reward": sample.total,
            "rewards": dict(sample.rewards),
            "pass_rate": pass_rate,
            "samples": samples,
        }
        return {"messages": [*sample.prompt.messages, reply], **columns, "provenance": provenance}


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
