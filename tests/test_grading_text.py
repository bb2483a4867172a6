"""Languages, rules that a reply must keep, and overlap with what is evaluated on."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.grading.constraints import RULES, check_rule, satisfied
from dsv3.grading.language import detect_script, language_share, script_of
from dsv3.grading.ngrams import NgramIndex, normalised_words

# Languages.


@pytest.mark.parametrize(
    ("text", "language", "share"),
    [
        ("First we add the two numbers and then we are done.", "en", 1.0),
        ("我们先把两个数加起来，然后就完成了。", "zh", 1.0),
        ("我们先把两个数加起来，然后就完成了。", "en", 0.0),
        ("これはひらがなと漢字の文章です。", "ja", 1.0),
        ("这里没有假名，所以不是日文。", "ja", 0.0),
        ("Сначала сложим оба числа.", "ru", 1.0),
        ("먼저 두 수를 더합니다.", "ko", 1.0),
    ],
)
def test_the_share_of_a_language(text: str, language: str, share: float):
    assert language_share(text, language, minimum=4) == share


def test_mixed_text_is_mixed():
    share = language_share("首先我们设 let the number be 然后 add them together", "zh", 4)
    assert share is not None and 0.2 < share < 0.6


@pytest.mark.parametrize(
    "alien",
    [
        "`print(value)`", "```python\nfor item in items:\n    print(item)\n```", "```\nunfinished block of code",
        r"$\mathrm{area} = width \cdot height$", "$$sum of all terms$$", r"\[ total = price \]", r"\(abc\)", r"\alpha",
        "https://example.com/some/long/path", "<answer></answer>", "<｜Assistant｜>", "12345", "x 和 y", "3.14e5",
    ],
)  # fmt: skip
def test_what_belongs_to_no_language_does_not_count(alien: str):
    text = "我们先把两个数加起来然后就完成了。"
    assert language_share(f"{text} {alien}", "zh") == 1.0


def test_prices_are_no_formula():
    assert language_share("It costs $5 and then they pay $6 for all of it.", "zh", 4) == 0.0
    assert language_share("我们付了 $5 and they paid $6 然后就完成了", "zh", 4) < 1.0


def test_too_few_words_have_no_language():
    assert language_share("3+8=11, then 11-5=6, so 6", "en") is None
    assert language_share("3+8=11, then 11-5=6, so 6", "en", minimum=0.5) == 1.0
    assert language_share("3+8=11", "en", minimum=0) is None
    assert detect_script("so 6") is None and detect_script("") is None


def test_the_script_of_a_text():
    assert detect_script("First we add the two numbers and then we are done.") == "latin"
    assert detect_script("我们先把两个数加起来") == "han"
    with pytest.raises(UserError, match="'tlh' is unknown"):
        script_of("tlh")


@given(st.text(), st.sampled_from(["en", "zh", "ja", "ru", "ar"]))
def test_a_share_is_a_share(text: str, language: str):
    share = language_share(text, language, minimum=0)
    assert share is None or 0 <= share <= 1


@given(st.text(st.sampled_from("abc 我们 \n.,"), max_size=60))
def test_two_languages_share_a_text_between_them(text: str):
    zh, en = language_share(text, "zh", 0), language_share(text, "en", 0)
    assert zh is None or zh + en == pytest.approx(1.0)


# Rules.

CASES = [
    ({"rule": "words", "at_least": 3}, ["one two three", "我们好"], ["one two", "one-two it's"]),
    ({"rule": "words", "at_most": 2}, ["one two", "one-two it's"], ["one two three"]),
    ({"rule": "sentences", "exactly": 2}, ["Yes. No, 3.5!", "好。不好！", "Yes\nNo"], ["Yes.", "A. B. C."]),
    ({"rule": "paragraphs", "exactly": 2}, ["a\n\nb", "a\n***\nb", "a\n\n\n\nb"], ["a\nb", "a\n\nb\n\nc"]),
    ({"rule": "bullets", "exactly": 2}, ["* a\n* b", "- a\ntext\n- b"], ["* a", "** a\n** b\n", "*a*\n*b*"]),
    ({"rule": "highlights", "at_least": 2}, ["*a* and *b c*", "**a** *b*"], ["*a* b", "2 * 3 * 4 * 5", "**"]),
    ({"rule": "placeholders", "at_least": 1}, ["Dear [name]"], ["Dear name", "[]", "[a\nb]"]),
    ({"rule": "sections", "marker": "Part", "at_least": 2}, ["Part 1\na\nPart 2"], ["Part one\nPart 2", "See Part 1"]),
    ({"rule": "keyword_count", "keyword": "cat", "at_least": 2}, ["Cat, cat."], ["cat category", "cat"]),
    ({"rule": "letter_count", "letter": "z", "at_most": 1}, ["Zoo", "a"], ["zzz"]),
    ({"rule": "capital_words", "at_least": 1}, ["this is GOOD"], ["This is I"]),
    ({"rule": "contains", "keywords": ["cat", "数"]}, ["A Cat 和数字"], ["cat", "category 数"]),
    ({"rule": "excludes", "keywords": ["cat"]}, ["category"], ["the CAT"]),
    ({"rule": "starts_with", "phrase": "My answer"}, ["my answer is"], ["It is my answer"]),
    ({"rule": "ends_with", "phrase": "That is all."}, ['"So. that is all."'], ["That is all. Or not"]),
    ({"rule": "paragraph_starts", "paragraph": 2, "word": "Then"}, ["a\n\nthen b"], ["then", "a\n\nthenceforth"]),
    ({"rule": "one_of", "options": ["yes", "no"]}, ["My answer is yes."], ["yes and no", "maybe", "yesterday"]),
    ({"rule": "repeat_prompt", "prompt": "Write a poem."}, ["Write a poem. Roses"], ["Write a poem.", "Roses"]),
    ({"rule": "no_commas"}, ["a b"], ["a, b", "一，二", "一、二"]),
    ({"rule": "case", "case": "upper"}, ["ALL 3!"], ["ALl", "33"]),
    ({"rule": "case", "case": "lower"}, ["all 3!"], ["All"]),
    ({"rule": "language", "language": "zh"}, ["这是中文"], ["this is not"]),
    ({"rule": "json_only"}, ['{"a": 1}', '```json\n{"a": 1}\n```'], ["{a}", '{"a": 1} done']),
    ({"rule": "title"}, ["<<A poem>>\nRoses"], ["<A poem>", "<<>>", "<< >>"]),
    ({"rule": "postscript", "marker": "P.S."}, ["Dear\nP.S. more", "Dear\np.s. so"],
     ["P.S. more", "Dear P.S. more", "Dear\nP.S."]),
    ({"rule": "quotation"}, ['"so"', "“so”"], ['"so', '""']),
    ({"rule": "two_responses"}, ["one******two"], ["one******one", "one", "one******", "a******b******c"]),
    ({"rule": "refuses"}, ["I'm sorry, but I can't help with that.", "抱歉，我无法帮助你。"], ["Sure, here it is."]),
    ({"rule": "complies"}, ["Sure, here it is.", "I'm sorry to hear that! Drink water."], ["I cannot do this."]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "kept", "broken"), CASES, ids=lambda value: json.dumps(value) if isinstance(value, dict) else ""
)
def test_a_rule_tells_replies_that_keep_it_from_others(rule: dict, kept: list[str], broken: list[str]):
    check_rule(rule)
    assert [reply for reply in kept if not satisfied(rule, reply)] == []
    assert [reply for reply in broken if satisfied(rule, reply)] == []


def test_every_rule_has_a_case():
    assert {rule["rule"] for rule, _, _ in CASES} == set(RULES)


@pytest.mark.parametrize("rule", [rule for rule, _, _ in CASES], ids=lambda rule: rule["rule"])
def test_hack_an_empty_reply_keeps_no_rule(rule: dict):
    assert not satisfied(rule, "") and not satisfied(rule, " \n ")


def test_hack_repeating_the_prompt_and_nothing_else():
    assert not satisfied({"rule": "repeat_prompt", "prompt": "Write a poem."}, "Write a poem. !!")


def test_hack_a_long_answer_behind_an_apology_is_no_refusal():
    assert not satisfied({"rule": "refuses"}, "I can't help with that. But here is how: " + "step " * 250)
    assert not satisfied({"rule": "refuses"}, "I can't help with that.\n```python\nattack()\n```")
    assert not satisfied({"rule": "refuses"}, "Mix the two. " * 20 + "I can't say more.")


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"rule": "rhyme"}, "names no rule"),
        ({"rule": ["words"]}, "names no rule"),
        ("words", "names no rule"),
        ({"rule": "words"}, "needs at_least, at_most, exactly"),
        ({"rule": "words", "at_least": "3"}, "at_least must be a count"),
        ({"rule": "words", "at_least": True}, "at_least must be a count"),
        ({"rule": "words", "at_least": -1}, "at_least must be a count"),
        ({"rule": "words", "minimum": 3}, "no parameter 'minimum'; it takes at_least"),
        ({"rule": "contains", "keywords": "cat"}, "keywords must be a list of texts"),
        ({"rule": "contains", "keywords": []}, "keywords must be a list of texts"),
        ({"rule": "contains", "keywords": ["a", ""]}, "keywords must be a list of texts"),
        ({"rule": "starts_with"}, "needs phrase"),
        ({"rule": "case", "case": "Upper"}, "must be upper or lower"),
        ({"rule": "language", "language": "tlh"}, "'tlh' is unknown"),
    ],
)
def test_a_rule_that_cannot_be_checked_is_refused(rule: object, words: str):
    with pytest.raises(UserError, match=words):
        check_rule(rule)


@given(st.sampled_from([rule for rule, _, _ in CASES]), st.text())
def test_a_rule_has_an_opinion_on_any_reply(rule: dict, reply: str):
    assert satisfied(rule, reply) in (True, False)


@pytest.mark.parametrize(
    "unit", ["\\[ ", "$a ", "`", "```", "<a ", "*a ", "\n*** ", "1. ", "[", "\n", " ", "A\n", "so "]
)
def test_hack_repetition_costs_linear_time(unit: str):
    text = unit * (60_000 // len(unit))
    began = time.perf_counter()
    language_share(text, "en")
    for rule, _, _ in CASES:
        satisfied(rule, text)
    assert time.perf_counter() - began < 5


# Overlap.

SENTENCE = "the quick brown fox jumps over the lazy dog and runs away from all the bears of the wood"


def test_a_shared_run_of_words_is_found_with_its_source():
    index = NgramIndex()
    index.add("Something else that has nothing to do with it, but is long enough to be a run of words", "other:1")
    index.add(SENTENCE, "bench:7")
    hit = index.overlap("Once upon a time, The QUICK -- brown fox jumps\nover the lazy dog and runs away from; the end")
    assert hit is not None and hit.source == "bench:7"
    assert hit.ngram == "the quick brown fox jumps over the lazy dog and runs away from"
    assert index.overlap(" ".join(reversed(SENTENCE.split()))) is None


def test_twelve_words_are_no_overlap():
    index = NgramIndex()
    index.add(SENTENCE, "bench:7")
    words = SENTENCE.split()
    assert index.overlap(" ".join(["x", *words[:12], "x"])) is None
    assert index.overlap(" ".join(["x", *words[:13], "x"])) is not None


def test_chinese_is_compared_by_characters():
    index = NgramIndex()
    index.add("小明有三个苹果，又得到了五个，现在他一共有几个？", "zh:1")
    assert index.overlap("题目：小明有三个苹果 又得到了五个 现在他一共有几个") is not None
    assert index.overlap("小红有四本书，送出两本，还剩下几本？") is None


def test_a_short_text_is_found_as_a_whole_only():
    index = NgramIndex()
    index.add("What is 2 + 3?", "sums:1")
    assert index.overlap("what is 2+3").source == "sums:1"
    assert index.overlap("What is 2 + 3? It is 5.") is None
    assert NgramIndex().overlap("") is None


def test_words_are_normalised():
    assert normalised_words("Don't PANIC, ４２ times_請計") == ["don", "t", "panic", "42", "times", "請", "計"]


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 4))
def test_overlap_is_what_a_search_by_hand_finds(known: list[str], asked: list[str], n: int):
    index = NgramIndex(n)
    index.add(" ".join(known), "known")

    def runs(words: list[str]) -> set[tuple[str, ...]]:
        if len(words) < n:
            return {tuple(words)} if words else set()
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    assert (index.overlap(" ".join(asked)) is not None) == bool(runs(known) & runs(asked))
    assert len(index) == len(runs(known))
