"""Traces say where they are from, and the report says what became of everything else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distilling
import pytest
import tiny_model
from distilling import Teacher, config_of, questions, read_rows, sum_of, thinking, traces, write_rows

from dsv3 import backends
from dsv3.core.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.training.chat_data import encode_example, load_rows
from dsv3.training.distill.config import TeacherSection
from dsv3.training.distill.teacher import checkpoint_hash, identity
from dsv3.training.distill.traces import load_benchmarks
from dsv3.training.grpo.prompts import PromptSet


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with backends.use_backend("cpu"):
        yield


def sometimes(question: str, seed: int) -> Any:
    """What is n plus n + 1: right in n of 4 samples (by seed modulo 4, as seeds of a prompt are consecutive)."""
    n = int(question.split()[2])
    return thinking(sum_of(question) + (seed % 4 >= n), f"I add them in way {seed}")


@pytest.fixture
def done(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    config = config_of(
        tmp_path,
        write_rows(tmp_path / "prompts.jsonl", questions(5)),
        sampling={"samples": 4, "temperature": 0.7, "max_tokens": 64},
    )
    return tmp_path, distilling.run(config, Teacher(sometimes))


def test_a_trace_holds_the_conversation_its_columns_and_where_it_is_from(done: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = done
    rows = read_rows(folder / "run" / "traces.jsonl")
    assert len(rows) == 0 + 1 + 2 + 3 + 4
    row = rows[0]
    seed = row["provenance"]["seed"]
    assert row["messages"] == [
        {"role": "user", "content": "What is 1 plus 2?"},
        {"role": "assistant", "content": "3", "reasoning_content": f"I add them in way {seed}"},
    ]
    assert (row["answer"], row["topic"]) == ("3", "sums")
    sample = next(s for s in read_rows(folder / "run" / "samples.jsonl") if s["seed"] == seed)
    assert row["provenance"] == {
        "teacher": "tutor",
        "endpoint": "http://127.0.0.1:9/v1",
        "prompt": sample["prompt"],
        "seed": seed,
        "sampling": {"temperature": 0.7, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "max_tokens": 64, "system": ""},
        "tokens": sample["tokens"],
        "reward": 1.0,
        "rewards": {"accuracy_exact": 1.0},
        "pass_rate": 0.25,
        "samples": 4,
    }


def test_traces_are_chat_data_and_prompts_of_middling_difficulty_are_prompts_for_reinforcement(
    done: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = done
    rows = list(load_rows(folder / "run" / "traces.jsonl"))
    tokenizer = tiny_model.TOKENIZER
    (example,) = encode_example(rows[0], tokenizer, "r1")
    learnt = [token for token, wanted in zip(*example, strict=True) if wanted]
    assert tokenizer.decode(learnt, skip_special=True).endswith("</think>\n\n3")
    fit = PromptSet.load([str(folder / "run" / "rl_prompts.jsonl")]).rows
    assert [(row["answer"], row["pass_rate"]) for row in fit] == [("3", 0.25), ("5", 0.5), ("7", 0.75)]
    rates = read_rows(folder / "run" / "pass_rates.jsonl")
    assert [row["pass_rate"] for row in rates] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert all(row["samples"] == 4 and row["right"] == 4 * row["pass_rate"] for row in rates)


def test_the_report_counts_everything(done: tuple[Path, dict[str, Any]]) -> None:
    folder, report = done
    assert report == json.loads((folder / "run" / "filter_report.json").read_text())
    assert (report["samples"], report["kept"], report["rejected"]) == (20, 10, {"wrong": 10})
    assert report["pass_rate"] == {"mean": 0.5, "prompts": 5, "never_right": 1, "always_right": 1, "rl_prompts": 3}
    assert report["samples"] == report["kept"] + sum(report["rejected"].values())


def test_every_kind_of_defect_is_counted_under_its_name(tmp_path: Path) -> None:
    def write(question: str, seed: int) -> Any:
        right = sum_of(question)
        defects = [
            thinking(right),
            thinking(right + 1),
            (thinking(right), "length"),
            str(right),
            thinking(right, "wait. " * 50),
            thinking(right),
        ]
        return defects[int(question.split()[2])]

    prompts = write_rows(tmp_path / "prompts.jsonl", questions(6))
    report = distilling.run(config_of(tmp_path, prompts, sampling={"samples": 1}), Teacher(write))
    assert report["rejected"] == {"wrong": 1, "truncated": 1, "malformed": 1, "repeated": 1}
    assert report["kept"] == 2
    assert report["pass_rate"]["mean"] == 4 / 6  # form does not enter: the answers of these were right


def test_a_planted_benchmark_item_is_neither_asked_nor_learnt(tmp_path: Path) -> None:
    item = "A farmer has seven cows and buys four more cows on a rainy Monday, so how many cows has he now?"
    prompts = write_rows(
        tmp_path / "prompts.jsonl",
        [
            {"prompt": f"Please answer. {item}", "answer": "11"},
            {"prompt": "What is 1 plus 2?", "answer": "3"},
            {"prompt": "What is 2 plus 3?", "answer": "5"},
        ],
    )
    benchmark = write_rows(tmp_path / "bench.jsonl", [{"question": "x"}, {"question": item, "meta": {"n": [1]}}])

    def write(question: str, seed: int) -> str:
        return thinking(sum_of(question), f"This reminds me: {item}" if "2 plus" in question else "I add them")

    config = config_of(
        tmp_path, prompts, filter={"benchmarks": [str(benchmark)]}, sampling={"samples": 1, "max_tokens": 64}
    )
    teacher = Teacher(write)
    report = distilling.run(config, teacher)
    assert sorted(question for question, _ in teacher.asked) == ["What is 1 plus 2?", "What is 2 plus 3?"]
    assert report["prompts_contaminated"] == 1
    assert report["contaminated"][0]["source"] == f"{benchmark}, line 2"
    assert report["rejected"] == {"contaminated": 1}
    assert [row["answer"] for row in traces(config)] == ["3"]


def test_benchmarks_may_be_plain_text_and_must_be_there(tmp_path: Path) -> None:
    lines = tmp_path / "items.txt"
    lines.write_text("one two three four five six seven eight nine ten eleven twelve thirteen fourteen\nshort one\n")
    index = load_benchmarks([str(lines)], 13)
    assert index is not None
    hit = index.overlap("zero two three four five six seven eight nine ten eleven twelve thirteen fourteen")
    assert hit is not None and hit.source == f"{lines}, line 1"
    with pytest.raises(UserError, match="cannot read"):
        load_benchmarks([str(tmp_path / "nothing.txt")], 13)
    assert load_benchmarks([], 13) is None
    folder = load_benchmarks([str(tmp_path)], 13)
    assert folder is not None and len(folder) == len(index), "a folder stands for the files below"


def test_other_contents_of_a_benchmark_filter_anew(tmp_path: Path) -> None:
    prompts, items = write_rows(tmp_path / "prompts.jsonl", questions(3)), tmp_path / "items.txt"
    items.write_text("nothing of the kind\n")
    config = config_of(tmp_path, prompts, filter={"benchmarks": [str(items)]})
    teacher = Teacher(lambda question, seed: thinking(sum_of(question), "one two three four five six seven " * 2))
    assert distilling.run(config, teacher)["kept"] == 3
    items.write_text("one two three four five six seven one two three four five six\n")
    assert distilling.run(config, teacher)["rejected"] == {"contaminated": 6}


def test_a_finished_filter_does_nothing_and_other_rules_filter_anew(tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", questions(5))
    config = config_of(tmp_path, prompts, sampling={"samples": 4, "max_tokens": 64})
    distilling.run(config, Teacher(sometimes))
    path = tmp_path / "run" / "traces.jsonl"
    before = path.stat().st_mtime_ns
    distilling.run(config, Teacher(sometimes))
    assert path.stat().st_mtime_ns == before
    capped = config_of(tmp_path, prompts, sampling={"samples": 4, "max_tokens": 64}, filter={"per_prompt": 1})
    asked = Teacher(sometimes)
    report = distilling.run(capped, asked)
    assert asked.asked == []
    assert report["kept"] == 4 and report["rejected"]["over_cap"] == 6


def test_scores_are_kept_so_that_judging_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv3.training.distill import verify

    monkeypatch.setattr(verify, "BATCH", 4)
    prompts = write_rows(tmp_path / "prompts.jsonl", questions(5))
    config = config_of(tmp_path, prompts, sampling={"samples": 4, "max_tokens": 64})
    batches = 0
    score = verify._score

    def counted(*args: Any) -> Any:
        nonlocal batches
        if batches == 2:
            raise RuntimeError("killed")
        batches += 1
        return score(*args)

    monkeypatch.setattr(verify, "_score", counted)
    with pytest.raises(RuntimeError, match="killed"):
        distilling.run(config, Teacher(sometimes))
    batches = -10
    distilling.run(config, Teacher(sometimes))
    assert batches == -10 + 3
    (scores,) = (tmp_path / "run").glob("scores-*.jsonl")
    assert len(read_rows(scores)) == 20 == len({(row["prompt"], row["seed"]) for row in read_rows(scores)})


def test_a_checkpoint_is_named_by_the_hash_of_its_files(tmp_path: Path) -> None:
    model = tiny_model.save(tmp_path / "model", "r1")
    first = checkpoint_hash(model, tmp_path)
    assert identity(TeacherSection(model=str(model)), tmp_path) == {
        "teacher": str(model), "checkpoint_sha256": first, "format": "", "thinking": False,
    }  # fmt: skip
    (model / "generation_config.json").write_text('{"temperature": 1}')
    assert checkpoint_hash(model, tmp_path) == first
    weights = next(model.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert checkpoint_hash(model, tmp_path) != first
    with pytest.raises(UserError, match="holds no model"):
        checkpoint_hash(tmp_path / "nothing", tmp_path)


def test_a_model_of_ours_is_a_teacher_and_the_same_one_each_time(tmp_path: Path) -> None:
    model = tiny_model.save(tmp_path / "model", "r1")
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "the cat"}, {"prompt": "a cat"}])
    lines = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        config = config_of(
            tmp_path / name, prompts, teacher={"model": str(model), "batch": 3}, rewards=[],
            filter={"style": "any"}, sampling={"samples": 3, "max_tokens": 8, "temperature": 1.0},
        )  # fmt: skip
        distilling.run(config)
        lines.append(sorted((tmp_path / name / "run" / "samples.jsonl").read_text().splitlines()))
    assert lines[0] == lines[1] and len(lines[0]) == 6
    assert all(json.loads(line)["text"].startswith("<think>\n") for line in lines[0])  # the prompt opened it
    assert len({json.loads(line)["text"] for line in lines[0]}) > 1
    assert Tokenizer.load(model).vocab_size == tiny_model.VOCABULARY
