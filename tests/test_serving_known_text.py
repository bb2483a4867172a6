"""Texts that were seen before are encoded in pieces, and come out as if they had been encoded whole."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import TOKENIZER

from dsv3.core.tokenizer import Tokenizer
from dsv3.serving.api.known_text import KnownTexts, cut

WORDS = [
    "the cat",
    "a",
    " ",
    "\n",
    "\n\n  ",
    "\t",
    "1 2",
    "2024",
    "深度",
    "é",
    "e\u0301",
    "'s it",
    "x.y = z",
    "  b",
    "؟",
]
TEXTS = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=4)), max_size=60).map("".join)


@pytest.fixture(scope="module")
def released(v3_data):
    return Tokenizer.load(v3_data)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, least=st.integers(1, 20))
def test_pieces_give_the_tokens_of_the_whole(released: Tokenizer, text: str, least: int):
    pieces = cut(text, least)
    assert "".join(pieces) == text and all(len(piece) >= least for piece in pieces[:-1])
    for tokenizer in (released, TOKENIZER):
        assert tokenizer.words_apart
        assert [token for piece in pieces for token in tokenizer.encode(piece)] == tokenizer.encode(text)


class Counting:
    """A tokenizer that counts the characters it reads."""

    words_apart = True

    def __init__(self) -> None:
        self.read = 0

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        self.read += sum(map(len, texts))
        return TOKENIZER.encode_batch(texts)


def sentence(number: int) -> str:
    return f"number {number} is the cat that sat on the mat and said so. "


def test_only_what_is_new_is_read_and_each_owner_reads_for_itself():
    tokenizer = Counting()
    known = KnownTexts(tokenizer, 100_000)
    history = "".join(map(sentence, range(100)))
    for owner in (1, 2):
        before = tokenizer.read
        assert known.encode(history, owner) == TOKENIZER.encode(history)
        assert tokenizer.read - before == len(history)
        for turn in range(1, 4):
            before, text = tokenizer.read, history + sentence(turn) * turn
            assert known.encode(text, owner) == TOKENIZER.encode(text)
            assert tokenizer.read - before < 600


def test_what_was_not_asked_for_lately_is_forgotten():
    tokenizer = Counting()
    known = KnownTexts(tokenizer, 3000)
    often, once = ["".join(map(sentence, range(start, start + 20))) for start in (0, 100)]
    known.encode(often, 0)
    for start in range(200, 400, 20):
        known.encode("".join(map(sentence, range(start, start + 20))), 0)
        known.encode(often, 0)
    before = tokenizer.read
    known.encode(often, 0)
    assert tokenizer.read - before < 400
    known.encode(once, 0)
    assert known._size <= 3000


def test_a_piece_that_comes_twice_in_one_text():
    text = (sentence(1) * 5 + "it ends. " * 20) * 6
    assert KnownTexts(TOKENIZER, 10_000).encode(text, 0) == TOKENIZER.encode(text)


def test_other_pre_tokenizers_are_not_cut():
    tree = json.loads(TOKENIZER._document)
    tree["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    other = Tokenizer(json.dumps(tree), {})
    assert not other.words_apart
    text = "".join(map(sentence, range(30)))
    assert KnownTexts(other, 1000).encode(text, 0) == other.encode(text)
