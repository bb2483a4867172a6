"""Reflection on a model whose every thought is known: the matrix, and what the two controls find."""

from pathlib import Path

import pytest
from evaluating import GREEDY, Scripted, Silent
from tiny_model import TOKENIZER, load, save

from dsv3.core.completer import Reply, split_reply
from dsv3.core.generate import SamplingParams
from dsv3.evaluation.items import Data, Item
from dsv3.evaluation.reflection import Traces, analyse
from dsv3.evaluation.runner import Options, Runner
from dsv3.evaluation.scoring import Graders
from dsv3.evaluation.subject import LocalSubject
from dsv3.evaluation.tasks import TASKS

GSM8K = TASKS["gsm8k"]
SHORT = SamplingParams(temperature=0.0, max_tokens=3, seed=0)


class Thinker(Scripted):
    """First says `first(n)` and then `last(n)`. Made to answer behind a thought cut short, it repeats the thought's
    last number; with a wrong beginning it says `mends(n)`."""

    def __init__(self, first, last, mends):
        super().__init__(lambda text, params: "", thinks=True)
        self.first, self.last, self.mends = first, last, mends
        self.begun: list[str] = []

    def complete(self, conversations, params, on_reply=None):
        replies = []
        for i, conversation in enumerate(conversations):
            n, final = int(conversation[0]["content"].split()[0]), conversation[-1]
            if final["role"] == "user":
                text = (
                    f"<think>\nSo {self.first(n)}. Wait, so {self.last(n)}.</think>\n\nIt is \\boxed{{{self.last(n)}}}."
                )
            elif final["content"]:
                assert final["content"] == "The final answer is \\boxed{" and final["prefix"]
                text = final["reasoning_content"].rstrip(".").split()[-1] + "}."
            else:
                self.begun.append(final["reasoning_content"])
                text = f". Wait, so {self.mends(n)}.</think>\n\n\\boxed{{{self.mends(n)}}}"
            replies.append(Reply(text, *split_reply(text), "stop", 1))
            if on_reply is not None:
                on_reply(i, replies[-1])
        return replies


def analysed(subject, out: Path, count: int = 8) -> dict:
    items = [Item(f"i{n}", f"{n} + 1", str(n + 1)) for n in range(count)]
    traces = Traces()
    with Graders() as graders:
        options = Options(out, max_tokens=40)
        Runner(subject, graders, options, Silent()).run(GSM8K, Data(items), GREEDY, traces)
        return analyse(subject, "gsm8k", traces.found, graders.math, GREEDY, options, Silent())


def test_what_thinking_on_changes_is_counted(tmp_path):
    """Items 0 and 1 are corrected, item 2 is spoilt, the others stay right."""
    subject = Thinker(
        first=lambda n: n + 1 if n > 1 else 99, last=lambda n: n + 1 if n != 2 else 98, mends=lambda n: n + 1
    )
    report = analysed(subject, tmp_path)
    matrix = report["matrix"]
    assert (matrix["wrong_right"], matrix["right_wrong"], matrix["right_right"]) == (2, 1, 5)
    assert matrix["correction_precision"] == pytest.approx(2 / 3) and matrix["net_gain"] == pytest.approx(1 / 8)
    control = report["control"]
    assert (control["items"], control["cut_short"], control["whole_thought"]) == (8, 6 / 8, 7 / 8)
    assert control["gain"] == pytest.approx(1 / 8)
    low, high = control["gain_interval"]
    assert low < 1 / 8 < high


def test_an_injected_error_is_mended_or_believed(tmp_path):
    subject = Thinker(lambda n: n + 1, lambda n: n + 1, mends=lambda n: n + 1 if n < 3 else n + 2)
    report = analysed(subject, tmp_path)
    injection = report["injection"]
    assert (injection["items"], injection["mended"]) == (8, 3 / 8)
    assert injection["matrix"]["recovery"] == 3 / 8
    assert subject.begun[3] == "So 5"  # 3 + 1 is 4
    low, high = injection["mended_interval"]
    assert low < 3 / 8 < high


def test_controls_are_kept_too(tmp_path):
    one = Thinker(lambda n: n + 1, lambda n: n + 1, lambda n: n + 1)
    first = analysed(one, tmp_path)
    again = Thinker(lambda n: n + 1, lambda n: n + 1, lambda n: n + 1)
    assert analysed(again, tmp_path) == first and again.begun == []


def test_a_server_cannot_be_made_to_think_on(tmp_path):
    subject = Thinker(lambda n: n + 1, lambda n: n + 1, lambda n: n + 1)
    subject.can_continue = False
    report = analysed(subject, tmp_path)
    assert "control" not in report and "loaded here" in report["note"]
    assert report["matrix"]["right_right"] == 8


def test_a_reply_without_a_thought_is_in_no_cell(tmp_path):
    report = analysed(Scripted(lambda text, params: "So 5.\n\\boxed{5}", thinks=True), tmp_path)
    assert report["matrix"]["no_candidate"] == 8 and "control" not in report


def test_a_real_model_is_made_to_go_on_from_a_beginning(tmp_path, monkeypatch):
    """The prompt ends with the thought so far, or behind it with what the answer begins with."""
    folder = save(tmp_path / "model", "r1")
    subject = LocalSubject(load(folder), TOKENIZER, "tiny", "0" * 16)
    begun = {"role": "assistant", "content": "", "reasoning_content": "so 6", "prefix": True}
    prompts: list[list[int]] = []
    generate = subject.rollout.generate
    monkeypatch.setattr(subject.rollout, "generate", lambda ids, params: prompts.extend(ids) or generate(ids, params))
    for message, end in (
        (begun, "<think>\nso 6"),
        (begun | {"content": "It is \\boxed{"}, "so 6\n</think>\n\nIt is \\boxed{"),
    ):
        conversation = [{"role": "user", "content": "1 + 5"}, message]
        subject.chat(True).complete([conversation], [SHORT])
        assert len(prompts[-1]) == subject.chat_tokens(conversation, True)
        assert subject.tokenizer.decode(prompts[-1]).endswith(end)
