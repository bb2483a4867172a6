"""The quickstart's task: nothing held out is trained on, every trace is right, and every legal reply fits."""

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.core.tokenizer import Tokenizer
from dsv3.grading.answers import exact
from dsv3.grading.formats import r1_format
from dsv3.grading.language import language_share
from dsv3.grading.reflection import Reflection
from dsv3.quickstart import arithmetic, reasoning
from dsv3.quickstart.arithmetic import (
    CHINESE,
    ENGLISH_THOUGHT,
    STYLES,
    chains,
    cold_start,
    problems,
    texts_for_tokenizer,
    transcripts,
)
from dsv3.quickstart.measure import MAX_TOKENS
from dsv3.training.chat_data import ChatRow, encode_example

SEEDS = st.integers(0, 2**31 - 1)


def test_chains_are_all_there_are_and_never_fall_below_zero():
    found = {chain.text: chain for chain in chains()}
    for text, chain in found.items():
        assert int(chain.answer) == eval(text)
        prefixes = re.findall(r"[+-]?\d", text)
        assert all(eval("".join(prefixes[:count])) >= 0 for count in range(1, len(prefixes) + 1))
        assert [step.split("=")[1] for step in chain.steps()][-1] == chain.answer
    assert {len(text) for text in found} == {5}
    wanted = (f"{a}{s}{b}{t}{c}" for a in range(1, 8) for s in "+-" for b in range(1, 8) for t in "+-"
              for c in range(1, 8))  # fmt: skip
    assert set(found) == {text for text in wanted if eval(text[:3]) >= 0 and eval(text) >= 0}
    assert reasoning.MEASURED <= sum(chain.held_out for chain in chains()) < len(found) * 0.4


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_what_is_held_out_is_in_no_training_data(seed: int):
    held_out = {problem.chain.text for problem in problems(reasoning.MEASURED, True, seed)}
    assert len(held_out) == reasoning.MEASURED
    trained = {problem.chain.text for problem in problems(300, False, seed)}
    assert not held_out & trained
    kept = {chain.text for chain in chains() if chain.held_out}
    for row in cold_start(100, seed):
        question = row["messages"][0]["content"]
        found = re.search(r"\d([+-]\d)+", question)
        assert found is None or found.group() not in kept


def test_sessions_add_and_subtract_one_number_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arithmetic, "TRANSCRIPTS", 300)
    for document in transcripts(0).documents():
        values: dict[str, int] = {}
        lines = iter(document.text.splitlines())
        for line in lines:
            asked = line.removeprefix(">>> ")
            if name := re.fullmatch(r"(\w) = (\d+)", asked):
                values[name[1]] = int(name[2])
                continue
            assert re.fullmatch(r"\w+ ?[+-] ?\d", asked), line
            assert eval(asked, {}, values) == int(next(lines))


def test_attempts_are_found_and_seen_to_be_corrected():
    found = Reflection()
    for problem in problems(200, False, 0):
        for language in ("en", "zh"):
            wrong = str(int(problem.chain.answer) + 1)
            message = problem.trace(language, True, wrong)["messages"][1]
            text = f"<think>\n{message['reasoning_content']}\n</think>\n\n{message['content']}"
            found.add(text, lambda answer, gold=problem.chain.answer: exact(answer, gold))
    assert (found.wrong_right, found.judged) == (400, 400)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_traces_are_right_well_formed(seed: int):
    for row in cold_start(100, seed):
        reply = row["messages"][1]["content"]
        thought = row["messages"][1]["reasoning_content"]
        assert r1_format(f"<think>\n{thought}\n</think>\n\n{reply}")
        assert re.findall(r"\d+", thought)[-1] == reply
        for left, right in re.findall(r"(\d+[+-]\d)=(\d+)", thought):
            assert eval(left) == int(right)


def test_the_shares_of_styles_and_languages_are_those_of_the_settings():
    count, chinese, mixed = Counter[str](), 0, 0
    rows = cold_start(5000, 0)
    for row in rows:
        question, thought = row["messages"][0]["content"], row["messages"][1]["reasoning_content"]
        count["direct" if "=" not in thought else "checked" if re.search("[?？]", thought) else "steps"] += 1
        if re.search("[\u4e00-\u9fff]", question):
            chinese += 1
            mixed += language_share(thought, "zh", 0.5) == 0
    for style, share in STYLES.items():
        assert count[style] / len(rows) == pytest.approx(share, abs=0.03)
    assert chinese / len(rows) == pytest.approx(CHINESE, abs=0.03)
    assert mixed / chinese == pytest.approx(ENGLISH_THOUGHT, abs=0.03)


def test_the_longest_legal_reply_fits_where_replies_are_sampled_and_measured(tmp_path: Path):
    """A shorter limit reads as bad form, and teaches the model brevity instead of thought."""
    # The quickstart's tokenizer has learnt code besides, and so fewer of the words here: one of bytes and digits alone
    # would be the worst case, and four times as many tokens. The real one is checked by the run itself, in truncated.
    tokenizer = Tokenizer.train([*texts_for_tokenizer(3000, 0)], 2048, single_digits=True)
    lengths = []
    for problem in problems(1000, False, 0):
        for language in ("en", "zh"):
            row = ChatRow(problem.trace(language, True, "20")["messages"])
            (example,) = encode_example(row, tokenizer, "r1")
            lengths.append(sum(example.loss_mask))
    assert min(lengths) > 20
    assert max(lengths) < MAX_TOKENS
