"""Running a task: settings, samples, resuming, what does not fit, and what a result says."""

import json
from dataclasses import replace

import pytest
from evaluating import GREEDY, Scripted, Silent, measured
from hypothesis import given
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.evaluation.asking import Unfinished
from dsv3.evaluation.items import Data, Item, Kind
from dsv3.evaluation.prompting import fit, limited, shots_for
from dsv3.evaluation.protocols import PROTOCOLS, Protocol, Samples, protocol
from dsv3.evaluation.results import interval, macro_interval, majority
from dsv3.evaluation.runner import Options, Runner
from dsv3.evaluation.scoring import Grade, Graders
from dsv3.evaluation.store import Store, digest, model_digest, seed_of
from dsv3.evaluation.subject import batches
from dsv3.evaluation.tasks import TASKS
from dsv3.grading.verdict import Verdict

MMLU, GSM8K = TASKS["mmlu"], TASKS["gsm8k"]
WARM = Protocol("warm", True, 64, Samples(4, (0.2, 0.8)), Samples(4, (0.2, 0.8)), "", top_p=0.9)


def sums(count: int) -> list[Item]:
    return [Item(f"i{i}", f"{i} + 1", str(i + 1), group="odd" if i % 2 else "even") for i in range(count)]


def adds(question: str, params=None) -> str:
    """Right where the first number is below 6."""
    value = int(question.split()[0])
    return f"Sure: \\boxed{{{value + 1 if value < 6 else 0}}}"


def test_a_result_counts_what_is_right_and_says_for_whom(tmp_path):
    result = measured(Scripted(adds), GSM8K, sums(8), tmp_path)
    assert result.value == 6 / 8 and result.low < 0.75 < result.high
    assert (result.items, result.of, result.samples, result.protocol) == (8, 8, 1, "greedy")
    assert result.groups == {"even": {"items": 4, "value": 0.75}, "odd": {"items": 4, "value": 0.75}}
    assert result.truncated == 0 and result.missing == 0 and result.mean_tokens == 2
    graded = [json.loads(line) for line in (tmp_path / "graded" / "gsm8k.greedy.jsonl").open()]
    assert [row["verdict"] for row in graded].count("right") == 6
    assert graded[7] == {"item": "i7", "sample": 0, "verdict": "wrong", "answer": "0", "gold": "8", "where": ""}


def test_samples_have_their_own_seeds_and_take_the_temperatures_in_turn(tmp_path):
    subject = Scripted(lambda text, params: f"\\boxed{{{1 if params.temperature < 0.5 else 9}}}")
    result = measured(subject, GSM8K, sums(2), tmp_path, WARM)
    params = [params for _, params in subject.asked]
    assert [each.temperature for each in params] == [0.2, 0.8] * 4
    assert len({each.seed for each in params}) == 8 and {each.top_p for each in params} == {0.9}
    assert result.value == 0.25 and result.samples == 4 and result.metric == "pass@1"
    assert result.extra["cons@4"] == 0.25  # one item right, by half of the votes
    assert result.low < 0.25 < result.high


def test_the_number_of_samples_is_the_protocols_for_sets_of_this_size():
    r1, v3 = PROTOCOLS["r1"], PROTOCOLS["v3"]
    assert (r1.max_tokens, r1.top_p, r1.thinks) == (32768, 0.95, True)
    assert r1.samples_of("aime24", 30) == r1.samples_of("gpqa", 198) == Samples(64, (0.6,))
    assert r1.samples_of("math500", 500) == Samples(16, (0.6,))
    assert v3.max_tokens == 8192 and v3.samples_of("aime24", 30) == Samples(16, (0.7,))
    assert v3.samples_of("math500", 500) == v3.samples_of("mmlu", 14042) == Samples(1)
    assert v3.samples_of("humaneval", 164).count == 4
    assert r1.with_options(2, 100).samples_of("aime24", 30) == Samples(2, (0.6,))
    with pytest.raises(UserError, match="there are r1, v3, base, greedy"):
        protocol("r2")


def test_fewer_samples_than_the_protocol_wants_are_told_apart(tmp_path):
    result = measured(Scripted(adds), GSM8K, sums(3), tmp_path, WARM, samples=2)
    assert (result.samples, result.full_samples) == (2, 4)


# Resuming


def test_the_same_command_asks_only_for_what_is_missing(tmp_path):
    broken = Scripted(adds, dies_after=5)
    with pytest.raises(Unfinished, match=r"gsm8k: the server has gone; 5 of 8 replies are kept in .*gsm8k.jsonl"):
        measured(broken, GSM8K, sums(8), tmp_path)
    healed = Scripted(adds)
    result = measured(healed, GSM8K, sums(8), tmp_path)
    assert [conversation[-1]["content"].split()[0] for conversation, _ in healed.asked] == ["5", "6", "7"]
    once = measured(Scripted(adds), GSM8K, sums(8), tmp_path / "other")
    assert (result.value, result.settings, result.groups) == (once.value, once.settings, once.groups)
    again = Scripted(adds)
    assert measured(again, GSM8K, sums(8), tmp_path).value == once.value and again.asked == []


def test_an_interrupt_keeps_what_there_is_and_says_so(tmp_path):
    def impatient(text: str, params) -> str:
        if text.startswith("3"):
            raise KeyboardInterrupt
        return adds(text)

    silent = Silent()
    with Graders() as graders, pytest.raises(KeyboardInterrupt):
        Runner(Scripted(impatient), graders, Options(tmp_path), silent).run(GSM8K, Data(sums(8)), GREEDY)
    assert silent.said[-1].startswith("gsm8k: 3 of 8 replies are kept in ")
    healed = Scripted(adds)
    assert measured(healed, GSM8K, sums(8), tmp_path).value == 6 / 8 and len(healed.asked) == 5


def test_a_line_that_a_crash_tore_off_is_asked_again(tmp_path):
    measured(Scripted(adds), GSM8K, sums(4), tmp_path)
    path = tmp_path / "replies" / "gsm8k.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    subject = Scripted(adds)
    assert measured(subject, GSM8K, sums(4), tmp_path).value == 1
    assert len(subject.asked) == 1
    assert measured(subject, GSM8K, sums(4), tmp_path).value == 1 and len(subject.asked) == 1


@pytest.mark.parametrize("change", [{"seed": 1}, {"max_tokens": 7}, {"samples": 2}])
def test_other_settings_are_other_replies(tmp_path, change):
    one = measured(Scripted(adds), GSM8K, sums(4), tmp_path, WARM)
    subject = Scripted(adds)
    other = measured(subject, GSM8K, sums(4), tmp_path, WARM, **change)
    if "samples" in change:  # the samples that are there count
        assert subject.asked == []
    else:
        assert subject.asked and one.settings != other.settings


def test_another_model_is_not_given_the_replies_of_the_first(tmp_path):
    measured(Scripted(adds), GSM8K, sums(4), tmp_path)
    subject = Scripted(adds)
    subject.digest = "f" * 16
    measured(subject, GSM8K, sums(4), tmp_path)
    assert len(subject.asked) == 4


def test_two_runs_into_one_folder_do_not_tear_each_others_lines_apart(tmp_path):
    with (
        Store(tmp_path / "a.jsonl"),
        pytest.raises(UserError, match="being written by another"),
        Store(tmp_path / "a.jsonl"),
    ):
        pass


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --out"), Store(tmp_path / "file" / "a.jsonl"):
        pass


@given(st.text(), st.text())
def test_seeds_are_fixed_by_item_and_sample_and_fit_every_server(task, item):
    assert seed_of(0, task, item, 3) == seed_of(0, task, item, 3) < 2**31
    assert seed_of(0, task, item, 3) != seed_of(0, task, item, 4)


def test_a_models_digest_changes_with_any_tensor(tmp_path):
    weights = bytearray(2**20)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(weights)
    before = model_digest(tmp_path)
    assert model_digest(tmp_path) == before
    weights[2**19] = 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert model_digest(tmp_path) != before
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})


# Which items, which shots, and what does not fit


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 5))
def test_a_limit_draws_by_the_seed_and_keeps_the_order(count, limit, seed):
    items = sums(count)
    chosen = limited(items, limit, seed)
    assert len(chosen) == min(count, limit) and chosen == limited(items, limit, seed)
    assert [items.index(item) for item in chosen] == sorted(items.index(item) for item in chosen)


def test_a_limited_result_says_so(tmp_path):
    result = measured(Scripted(adds), GSM8K, sums(8), tmp_path, limit=3)
    assert (result.items, result.of) == (3, 8)


def test_shots_come_from_their_group_or_are_missed():
    data = Data(sums(4), {"even": sums(3), "odd": []})
    show = shots_for(MMLU, data, 2, 0)
    assert [shot.id for shot in show(data.items[0])] == ["i0", "i1"]
    with pytest.raises(UserError, match=r"mmlu: 2 shots are wanted, and the data has 0 of odd.*give --shots 0"):
        show(data.items[1])
    drawn = Data(sums(4), {"": sums(50)}, drawn=True)
    seeds = [[shot.id for shot in shots_for(GSM8K, drawn, 8, seed)(data.items[0])] for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_shots_are_dropped_until_the_question_fits():
    item, *shots = sums(4)
    words = lambda text: list(range(len(text.split())))  # noqa: E731
    whole = fit(GSM8K, item, [], words, 1000)
    size = len(whole.tokens)
    assert whole.text == "Question: 0 + 1\nAnswer:" and whole.shots == 0
    assert fit(GSM8K, item, [], words, size - 1).shots is None
    worked = [Item(shot.id, shot.question, shot.gold, extra={"solution": "easy"}) for shot in shots]
    full = fit(GSM8K, item, worked, words, 1000)
    assert full.shots == 3 and fit(GSM8K, item, worked, words, len(full.tokens) - 1).shots == 2


def test_questions_that_do_not_fit_count_as_wrong_and_are_named(tmp_path):
    items = [*sums(3), Item("long", "9 " * 500, "1")]
    subject = Scripted(adds, context=100)
    result = measured(subject, GSM8K, items, tmp_path)
    assert len(subject.asked) == 3 and result.value == 0.75 and result.missing == 0.25
    assert "too long for the context, and so wrong: 1 question" in result.flags
    assert "replies had room for 100 tokens, not 8,192" in result.flags


def test_items_of_one_name_and_no_items_at_all_are_refused(tmp_path):
    with pytest.raises(UserError, match="the id 'i0' is also at"):
        measured(Scripted(adds), GSM8K, [*sums(1), *sums(1)], tmp_path)
    with pytest.raises(UserError, match="no items to ask"):
        measured(Scripted(adds), GSM8K, [], tmp_path)


def test_a_server_cannot_be_asked_as_base_models_are(tmp_path):
    with pytest.raises(UserError, match="give --protocol r1, v3 or greedy"):
        measured(Scripted(adds), GSM8K, sums(1), tmp_path, PROTOCOLS["base"], shots=0)


def test_gold_answers_that_nobody_can_read(tmp_path):
    items = [*sums(1), Item("odd", "7 + 1", "the number of the beast is a \\frac{", where="own.jsonl:2")]
    result = measured(Scripted(adds), GSM8K, items, tmp_path)
    assert result.notes == ["compared as text only: 1 gold answer (own.jsonl:2)"]
    with Graders() as graders, pytest.raises(UserError, match=r"own.jsonl:2: the answer .* cannot be understood"):
        graders.doubts(replace(GSM8K, strict=True), items)


# Numbers


def test_intervals():
    assert interval([[1.0]] * 10 + [[0.0]] * 10) == pytest.approx((0.299, 0.701), abs=1e-3)  # Wilson
    alike = interval([[1.0] * 4] * 5 + [[0.0] * 4] * 5)
    assert alike[1] - alike[0] > 0.6  # samples of one item say nothing new
    low, high = interval([[0.3], [0.4], [0.5]])
    assert 0 <= low < 0.4 < high <= 1
    low, high = macro_interval([[1.0, 0.0], [1.0], [0.0, 0.0, 1.0]])
    assert 0 <= low < (0.5 + 1 + 1 / 3) / 3 < high <= 1


def test_the_majority_counts_equal_answers_as_one():
    def votes(*answers: str | None) -> float:
        return majority([Grade(Verdict.RIGHT if a in ("1/2", "0.5") else Verdict.WRONG, a) for a in answers])

    assert votes("1/2", "0.5", "3", "4") == 1
    assert votes("3", "3", "0.5", None) == 0
    assert votes("3", "0.5") == 0.5
    assert votes(None, None) == 0


def test_ceval_is_the_mean_over_subjects(tmp_path):
    task = TASKS["ceval"]
    items = [Item(f"law/{i}", "Q", "A", ("a", "b", "c", "d"), "law") for i in range(9)]
    items.append(Item("art/0", "Q", "B", ("a", "b", "c", "d"), "art"))
    result = measured(Scripted(lambda text, params: "答案：A"), task, items, tmp_path)
    assert result.value == 0.5 and result.metric == "accuracy, mean over subjects"


def test_progress_says_how_far_it_is(tmp_path):
    silent = Silent()
    with Graders() as graders:
        Runner(Scripted(adds), graders, Options(tmp_path), silent).run(GSM8K, Data(sums(3)), GREEDY)
    assert any(line.startswith("gsm8k | 3/3 replies | ") and line.endswith(" left") for line in silent.shown)


def test_every_kind_of_task_has_a_scorer(tmp_path):
    assert {task.kind for task in TASKS.values()} | {Kind.TEXT, Kind.FIND} == set(Kind)


@given(st.lists(st.integers(1, 2**18 + 5), max_size=30), st.integers(1, 8))
def test_a_batch_holds_so_many_prompts_and_so_many_tokens(lengths, most):
    found = list(batches(lengths, most))
    assert sorted(i for rows in found for i in rows) == list(range(len(lengths)))
    for rows in found:
        assert 1 <= len(rows) <= most
        assert len(rows) == 1 or sum(lengths[i] for i in rows) <= 2**18


def test_dated_problems_are_those_of_the_reports_months(tmp_path):
    dates = ("2024-07-31", "2024-08-01T00:00:00", "2024-11-30", "2024-12-01", "2025-02-01")
    items = [Item(f"i{n}", f"{n} + 1", str(n + 1), extra={"date": date}) for n, date in enumerate(dates)]
    v3, r1 = PROTOCOLS["v3"], PROTOCOLS["r1"]
    asked = {each.name: sum(each.covers(date) for date in dates) for each in (v3, r1, GREEDY)}
    assert asked == {"v3": 2, "r1": 3, "greedy": 5}
    result = measured(Scripted(adds), GSM8K, items, tmp_path, v3)
    assert (result.items, result.of) == (2, 2)
    with pytest.raises(UserError, match="protocol v3 asks problems of 2024-08 to 2024-11"):
        measured(Scripted(adds), GSM8K, items[:1], tmp_path, v3)
