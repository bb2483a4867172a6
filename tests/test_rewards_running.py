"""How rewards are set up and run together, and what happens when one of them fails."""

import asyncio
import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rewarding import RIGHT, one, scored

from dsv3.errors import UserError
from dsv3.training.rewards.registry import PATIENCE, Rewards, RewardSection, Scores, build

# Settings.


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"name": "acuracy"}, "'acuracy' is no reward; known are accuracy_math"),
        ({"name": "format", "options": {"stile": "r1"}}, "options of format: unknown key stile; did you mean style"),
        ({"name": "format", "options": {"style": "r2"}}, "style must be one of r1, r1-zero"),
        ({"name": "length"}, "max_tokens must be set"),
        ({"name": "length", "options": {"max_tokens": 10, "soft_tokens": 11}}, "at most max_tokens"),
        ({"name": "language", "options": {"language": "tlh"}}, "unknown"),
        ({"name": "accuracy_choice", "options": {"letters": "AAB"}}, "different capitals"),
        ({"name": "judge"}, "url and model must be set"),
        ({"name": "mine:score", "options": {"a": 1}}, "options are for built-in rewards"),
    ],
)
def test_settings_that_mean_nothing_are_refused(section: dict, words: str):
    with pytest.raises(UserError, match=words):
        RewardSection.from_dict(section)


def test_a_reward_is_named_once():
    with pytest.raises(UserError, match="format is there twice"):
        build([RewardSection("format"), RewardSection("format")])


def test_totals_are_weighted_and_none_counts_as_nothing():
    sections = [RewardSection("accuracy_exact", 2.0), RewardSection("format", 0.1), RewardSection("language", 0.5)]
    with build(sections) as rewards:
        found = scored(rewards, RIGHT, "6", answer="6", language="en")
    assert found.total == pytest.approx([2.1, 2.0])
    assert found.by_name["language"] == [None, None]
    assert found.problems == {}


def test_no_completions_have_no_scores():
    with one("format") as rewards:
        assert rewards.score([], [], {}) == Scores([], {"format": []}, {})


def test_the_quickstart_batch_is_scored_fast_and_in_this_process():
    sections = [
        RewardSection("accuracy_exact"),
        RewardSection("format", 0.1),
        RewardSection("language", 0.1, {"minimum": 0.5}),
    ]
    with build(sections) as rewards:
        taken = []
        for _ in range(5):
            began = time.perf_counter()
            found = scored(rewards, *[RIGHT] * 256, answer="6", language="en")
            taken.append(time.perf_counter() - began)
    assert found.total == pytest.approx([1.2] * 256)
    assert min(taken) < 0.05


# Code of the user.


def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "myrewards", raising=False)
    (tmp_path / "myrewards.py").write_text(source)


def test_functions_of_the_user_get_prompts_completions_and_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module(tmp_path, monkeypatch, """
def everything(prompts, completions, **columns):
    assert [m["content"] for p in prompts for m in p] == ["What is 3+8-5?"] * 2
    assert sorted(columns) == ["answer", "completion_ids", "finish_reasons"]
    return [len(text) for text in completions]

def some(completions, answer, prompts):
    return [None if gold == "?" else text == gold for text, gold in zip(completions, answer)]

async def later(prompts, completions, **columns):
    import asyncio
    await asyncio.sleep(0.01)
    return [0.5] * len(completions)
""")  # fmt: skip
    names = ["myrewards:everything", "myrewards:some", "myrewards:later"]
    with build([RewardSection(name) for name in names]) as rewards:
        rewards.check_rows([{"answer": "?"}])
        found = scored(rewards, "6", "66", answer=["6", "?"])
    assert found.by_name == dict(zip(names, ([1.0, 2.0], [1.0, None], [0.5, 0.5]), strict=True))
    assert found.total == [2.5, 2.5]


@pytest.mark.parametrize(
    ("name", "words"), [("nowhere:f", "cannot import"), ("math:nothing", "cannot import"), ("math:pi", "no function")]
)
def test_functions_that_are_not_there(name: str, words: str):
    with pytest.raises(UserError, match=words):
        build([RewardSection(name)])


def alone(function: Callable[..., Any], timeout: float = 5.0) -> tuple[Rewards, list[str]]:
    rewards, said = (
        Rewards(
            [("mine", function, 1.0), ("other", lambda prompts, completions: [1] * len(completions), 1.0)], timeout
        ),
        [],
    )
    rewards.say = said.append
    return rewards, said


def raising(prompts: Any, completions: Any) -> Any:
    raise KeyError("answer")


def leaving(prompts: Any, completions: Any) -> Any:
    sys.exit(3)


async def raising_later(prompts: Any, completions: Any) -> Any:
    raise ValueError("two\nlines")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (raising, "KeyError: 'answer'"),
        (leaving, "SystemExit: 3"),
        (raising_later, "ValueError: two lines"),
        (lambda prompts, completions: None, "it returned NoneType"),
        (lambda prompts, completions: "11", "it returned str"),
        (lambda prompts, completions: [1.0], "1 scores for 2 completions"),
        (lambda prompts, completions: [1.0, "high"], "could not convert"),
        (lambda prompts, completions, missing: [1, 1], "missing"),
    ],
)
def test_a_function_that_fails_scores_nothing_and_says_so_once(function: Callable[..., Any], words: str):
    rewards, said = alone(function)
    with rewards:
        for _ in range(PATIENCE - 1):
            found = scored(rewards, "a", "b")
            assert found.by_name == {"mine": [None, None], "other": [1.0, 1.0]} and found.total == [1.0, 1.0]
            assert found.problems == {"mine/raised": 1}
        assert len(said) == 1 and words in said[0]
        with pytest.raises(UserError, match=f"mine failed in {PATIENCE} batches in a row"):
            scored(rewards, "a", "b")


def test_failures_that_are_not_in_a_row_do_not_end_the_run():
    turns = iter([False, False, True] * 3)

    def moody(prompts: Any, completions: Any) -> list[float]:
        if not next(turns):
            raise RuntimeError
        return [1.0] * len(completions)

    rewards, _ = alone(moody)
    with rewards:
        totals = [scored(rewards, "a").total for _ in range(9)]
    assert totals == [[1.0], [1.0], [2.0]] * 3


def test_a_function_that_hangs_is_not_waited_for():
    release = threading.Event()

    def hanging(prompts: Any, completions: Any) -> list[float]:
        release.wait(60)
        return [1.0] * len(completions)

    rewards, said = alone(hanging, timeout=0.1)
    with rewards:
        began = time.perf_counter()
        found = scored(rewards, "a")
        assert time.perf_counter() - began < 5
        assert found.by_name == {"mine": [None], "other": [1.0]} and found.problems == {"mine/hung": 1}
        assert "more than 0.1 seconds" in said[0]
        assert scored(rewards, "a").problems == {"mine/hung": 1}  # not called a second time while it is in the first
        with pytest.raises(UserError, match="batches in a row"):
            scored(rewards, "a")
        release.set()


def test_a_function_that_was_late_is_asked_again_and_its_late_scores_are_dropped():
    release, calls = threading.Event(), []

    def slow_at_first(prompts: Any, completions: Any) -> list[float]:
        calls.append(completions)
        if len(calls) == 1:
            release.wait(60)
            return [99.0]
        return [2.0]

    rewards, _ = alone(slow_at_first, timeout=0.3)
    with rewards:
        assert scored(rewards, "first").by_name["mine"] == [None]
        release.set()
        time.sleep(0.1)
        assert scored(rewards, "second").by_name["mine"] == [2.0]
    assert calls == [["first"], ["second"]]


def test_a_coroutine_that_hangs_is_cancelled():
    ended: list[str] = []

    async def hanging(prompts: Any, completions: Any) -> list[float]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return [1.0]

    rewards, _ = alone(hanging, timeout=0.1)
    with rewards:
        assert scored(rewards, "a").problems == {"mine/hung": 1}
        for _ in range(100):
            if ended:
                break
            time.sleep(0.02)
    assert ended == ["cancelled"]


def test_a_function_that_gives_up_by_itself_has_raised():
    def impatient(prompts: Any, completions: Any) -> list[float]:
        raise TimeoutError("the server is slow")

    rewards, said = alone(impatient)
    with rewards:
        assert scored(rewards, "a").problems == {"mine/raised": 1}
    assert "TimeoutError: the server is slow" in said[0]


def test_scores_that_are_no_finite_numbers_are_left_out():
    rewards, said = alone(lambda prompts, completions: [math.nan, math.inf, 1, None])
    with rewards:
        found = scored(rewards, *"abcd")
    assert found.by_name["mine"] == [None, None, 1.0, None]
    assert found.problems == {"mine/not finite": 2} and len(said) == 1


def test_a_function_cannot_change_what_the_others_see():
    def greedy(prompts: Any, completions: Any, answer: Any) -> list[float]:
        completions[0], answer[0] = "6", "6"
        prompts.clear()
        return [1.0]

    def last(prompts: Any, completions: Any, answer: Any) -> list[float]:
        time.sleep(0.05)
        return [float(len(prompts) == 1 and completions == ["7"] and answer == ["5"])]

    with Rewards([("greedy", greedy, 1.0), ("last", last, 1.0)]) as rewards:
        assert scored(rewards, "7", answer="5").by_name["last"] == [1.0]
