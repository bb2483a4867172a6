"""What is unfit to learn from is rejected, for a reason that is counted; what is fit stays."""

from collections import Counter
from typing import Any

import pytest
from distilling import thinking
from hypothesis import given
from hypothesis import strategies as st

from dsv3.grading.ngrams import NgramIndex
from dsv3.training.distill.config import FilterSection
from dsv3.training.distill.filters import (
    Filter,
    Sample,
    is_right,
    jaccard,
    longest_paragraph,
    repetitions,
    shingles_of,
)
from dsv3.training.distill.prompts import Prompt

THOUGHT = "First I add the tens and then the ones, which gives the sum that was asked for."
CHINESE = "先把十位相加，再把个位相加，这样就得到题目所要求的总和。"
MIXED = THOUGHT + CHINESE + "所以答案就在这里，我们已经算好了。"


def sample(text: str = thinking(5, THOUGHT), finish: str = "stop", tokens: int = 20, **fields: Any) -> Sample:
    rewards = fields.pop("rewards", {"accuracy_math": 1.0})
    prompt = Prompt("p", [{"role": "user", "content": fields.pop("prompt", "What is 2 plus 3?")}], fields)
    return Sample(prompt, 0, text, finish, tokens, 1.0, rewards)


def reason(given: Sample, benchmarks: NgramIndex | None = None, **settings: Any) -> str | None:
    return Filter(FilterSection(**settings), ["accuracy_math", "format"], benchmarks).reason(given)


@pytest.mark.parametrize(
    ("given", "settings", "expected"),
    [
        (sample(), {}, None),
        (sample(finish="length"), {}, "truncated"),
        (sample("", finish="refused"), {}, "refused"),
        (sample(rewards={"accuracy_math": 0.0}), {}, "wrong"),
        (sample(rewards={"accuracy_math": None}), {}, "unverified"),
        (sample(rewards={}), {}, "unverified"),
        (sample(rewards={"accuracy_math": None}), {"unverified": "keep"}, None),
        (sample(rewards={"accuracy_math": 0.5}), {"minimum": {"accuracy_math": 0.5}}, None),
        (sample(rewards={"accuracy_math": 1.0, "format": 0.4}), {"minimum": {"format": 0.5}}, "low_format"),
        (sample(rewards={"accuracy_math": 1.0, "format": 0.6}), {"minimum": {"format": 0.5}}, None),
        (sample("5"), {}, "malformed"),
        (sample("5"), {"style": "any"}, None),
        (sample("<think></think>5"), {}, "malformed"),
        (sample("<think>a</think>"), {}, "malformed"),
        (sample(thinking("5", "a<think>b")), {}, "malformed"),
        (sample(thinking("5", THOUGHT)), {"style": "r1-zero"}, "malformed"),
        (sample(thinking("<answer>5</answer>", THOUGHT)), {"style": "r1-zero"}, None),
        (sample(tokens=101), {"max_tokens": 100}, "overlong"),
        (sample(tokens=100), {"max_tokens": 100}, None),
        (sample(thinking(5, "a" * 50)), {"max_paragraph": 49}, "long_paragraph"),
        (sample(thinking(5, "a" * 50 + "\n\n" + "b" * 50)), {"max_paragraph": 50}, None),
        (sample(thinking(5, "```python\nprint(2 + 3)\n```")), {"code_blocks": False}, "code_block"),
        (sample(thinking(5, "```python\nprint(2 + 3)\n```")), {}, None),
        (sample(thinking("```python\nprint(2 + 3)\n```", THOUGHT)), {"code_blocks": False}, None),
        (sample(thinking(5, MIXED)), {"language": 0.9}, "mixed_language"),
        (sample(thinking(5, MIXED)), {}, None),
        (sample(thinking(5, CHINESE)), {"language": 0.9}, "mixed_language"),
        (sample(thinking(5, CHINESE), prompt="二加三等于多少？"), {"language": 0.9}, None),
        (sample(thinking(5, CHINESE), language="zh"), {"language": 0.9}, None),
        (sample(thinking(5, THOUGHT), language="zh"), {"language": 0.9}, "mixed_language"),
        (sample(thinking(5, "2 + 3 = 5"), language="zh"), {"language": 0.9}, None),  # no words to judge by
        (sample(thinking(5, "so 5"), language="zh"), {"language": 0.9, "language_words": 0.5}, "mixed_language"),
        (sample(thinking(5, "wait. " * 40)), {}, "repeated"),
        (sample(thinking(5, "wait. " * 40)), {"repeat_limit": 0}, None),
    ],
)
def test_a_sample_is_rejected_for_what_is_wrong_with_it(
    given: Sample, settings: dict[str, Any], expected: str | None
) -> None:
    assert reason(given, **settings) == expected


def test_without_an_accuracy_reward_nothing_is_unverified() -> None:
    assert Filter(FilterSection(), ["format"]).reason(sample(rewards={"format": 0.0})) is None


def test_a_sample_is_right_if_all_who_could_judge_say_so() -> None:
    names = ["accuracy_math", "accuracy_code", "format"]

    def verdict(**rewards: float | None) -> bool | None:
        return is_right("stop", rewards, names, {})

    assert verdict(accuracy_math=1.0, accuracy_code=None, format=0.0) is True
    assert verdict(accuracy_math=1.0, accuracy_code=0.0) is False
    assert verdict(accuracy_math=None, accuracy_code=None, format=1.0) is None
    assert is_right("length", {}, names, {}) is False
    assert is_right("stop", {"format": 1.0}, ["format"], {}) is None


def test_what_shares_a_run_of_words_with_a_benchmark_is_not_learnt() -> None:
    index = NgramIndex(13)
    planted = "Natalia sold clips to forty eight of her friends in April and then half as many in May"
    index.add(planted, "gsm8k.jsonl, line 1")
    assert reason(sample(thinking(5, f"This is like: {planted.upper()}!")), index) == "contaminated"
    assert reason(sample(thinking(5, "Natalia sold clips to her friends in April.")), index) is None


def choose(texts: list[str], **settings: Any) -> tuple[list[str], Counter[str]]:
    kept, rejected = Filter(FilterSection(**settings), ["accuracy_math"]).choose([sample(text) for text in texts])
    return [one.text for one in kept], rejected


def test_of_equal_replies_to_a_prompt_the_first_stays() -> None:
    texts = [thinking(5, THOUGHT), thinking(5, THOUGHT.upper().replace(" ", "  ")), thinking(5, "Two and three.")]
    assert choose(texts) == ([texts[0], texts[2]], Counter(duplicate=1))
    # Signs matter: these are different thoughts.
    signs = [thinking(5, "8-3=5"), thinking(5, "8+3=5")]
    assert choose(signs)[0] == signs


def test_equal_replies_to_different_prompts_are_no_duplicates() -> None:
    rules = Filter(FilterSection(), ["accuracy_math"])
    assert [len(rules.choose([sample(prompt=text)])[0]) for text in ("a?", "b?", "a?")] == [1, 1, 0]


def test_near_duplicates_count_as_one_where_that_is_asked_for() -> None:
    a = thinking(5, "I add two and three, first on my fingers and then on paper, and both give five as the sum.")
    b = a.replace("paper", "wood")
    other = thinking(5, "Three plus two is the same as two plus three and I know that by heart since school days.")
    assert choose([a, b, other], near_duplicate=0.6) == ([a, other], Counter(near_duplicate=1))
    assert choose([a, b, other])[0] == [a, b, other]
    assert choose([a, b, other], near_duplicate=0.9)[0] == [a, b, other]


def test_a_prompt_gives_no_more_traces_than_the_cap_and_rejected_ones_do_not_fill_it() -> None:
    texts = ["5", thinking(5, "one way"), thinking(5, "another way"), thinking(5, "a third way")]
    assert choose(texts, per_prompt=2) == (texts[1:3], Counter(malformed=1, over_cap=1))


words = st.lists(st.sampled_from(["a", "b", "c", "-", "+", "三"]), max_size=30).map(" ".join)


@given(words, words)
def test_overlap_is_symmetric_and_whole_with_itself(a: str, b: str) -> None:
    one, two = shingles_of(a), shingles_of(b)
    assert jaccard(one, two) == jaccard(two, one) and 0 <= jaccard(one, two) <= 1
    assert jaccard(one, one) == 1


@given(st.integers(1, 30), st.integers(2, 12), st.integers(1, 5))
def test_a_loop_of_any_length_repeats_some_run(period: int, times: int, n: int) -> None:
    loop = " ".join(f"w{i}" for i in range(period))
    assert repetitions(" ".join([loop] * times), min(n, period)) >= times - 1
    assert repetitions(" ".join(f"w{i}" for i in range(200)), n) == 1


def test_paragraphs_end_at_blank_lines() -> None:
    assert longest_paragraph("abc\ndef\n\nxy\n   \nuvwxyz123") == 9
    assert longest_paragraph("") == 0
