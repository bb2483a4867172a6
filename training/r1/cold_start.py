"""From R1-Zero's samples to cold-start conversations: readable ones, and ones in which an error is found and mended.

R1-Zero writes for the reward alone. What is kept are samples that are right and in one language; rules put them into
the form of a chat, and a model, where one is given, into prose (R1 report, section 2.3.1, where V3 does it and people
look over the result).
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...core.completer import Completer, Reply, split_reply
from ...core.files import atomic_write
from ...grading.answers import ANSWER, CONTROL, END_ANSWER, exact, final_answer
from ...grading.formats import r1_zero_format
from ...grading.language import detect_script
from ...grading.reflection import candidates, until_first
from ..distill.filters import is_right
from ..distill.prompts import Prompt, load_prompts
from ..distill.sampling import KEYS, SAMPLES
from ..distill.traces import PASS_RATES, TRACES
from ..distill.verify import scores_log
from ..distill.worklog import WorkLog
from ..progress import Progress
from .config import ColdStartSection

ROWS, REPORT, REWRITES = "cold_start.jsonl", "report.json", "rewrites"

# Said between an attempt and its correction; {answer} is what the attempt came to.
DOUBTS = {
    "en": (
        "Wait, let me check whether {answer} is right before I go on. It is not: there is a mistake above. Once more.",
        "Let me verify that. {answer} does not hold up, so I must have made an error. I start again, with more care.",
        "Hmm, {answer}? Checking it against the question, that cannot be right. Let me go through it again.",
    ),
    "zh": (
        "等等，先检查一下{answer}对不对。不对，上面有错误，重新来一遍。",
        "验证一下：{answer}不成立，前面一定算错了。更仔细地再做一次。",
        "嗯，{answer}？对照题目检查，这不可能是对的，重新推一遍。",
    ),
}
CONCLUSIONS = {"en": "The answer is \\boxed{{{answer}}}.", "zh": "答案是 \\boxed{{{answer}}}。"}

REWRITE = """\
Below are a problem and the notes of somebody who solved it. Rewrite the notes so that they are pleasant to read.
- Keep every step, every check, every wrong turn and every correction, in their order. Add no new ones.
- Write whole sentences in the language of the problem. Break them into paragraphs. Formulas may stay formulas.
- Then write a summary for the reader: how the problem is solved, and the final answer, unchanged, in \\boxed{}.
Reply in exactly this form:
<notes>the rewritten notes</notes>
<summary>the summary</summary>"""
_REWRITTEN = re.compile(r"\s*<notes>(.+)</notes>\s*<summary>(.+)</summary>\s*", re.DOTALL)


@dataclass(frozen=True)
class Readable:
    """A reply as a chat shows it."""

    thought: str
    content: str


def tidy(text: str) -> str:
    """Without control tokens, tags of the answer, trailing blanks, and runs of empty lines."""
    text = CONTROL.sub("", text).replace(ANSWER, "").replace(END_ANSWER, "")
    text = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def language_of(prompt: Prompt) -> str:
    """What a prompt is written in, as far as there are phrases for it: by its `language`, else by its script."""
    named = prompt.columns.get("language")
    return "zh" if named == "zh" or (named is None and detect_script(prompt.text, 1.0) == "han") else "en"


def by_rules(text: str, language: str) -> Readable:
    """R1-Zero's reply as a thought and a sentence with the answer; an answer that is a text already stays so."""
    thought, rest = split_reply(text)
    reply, answer = tidy(rest), final_answer(text, whole=True)
    if answer is not None and (exact(reply, answer) or reply == answer):
        reply = CONCLUSIONS[language].format(answer=answer)
    return Readable(tidy(thought), reply)


def corrected(wrong: str, right: str, language: str, pick: int) -> Readable | None:
    """A trace that tries as `wrong` does, doubts the answer it comes to, and then goes the way of `right`.

    Both are replies to one prompt. None where the attempt names no answer, or the one it names first is not wrong.
    pick: which of the phrases is used.
    """
    final = final_answer(right, whole=True)
    attempt = until_first(wrong)
    answer = candidates(attempt)[-1] if attempt is not None and candidates(attempt) else None
    if answer is None:  # the thought itself names none: the whole of it is the attempt
        attempt, answer = split_reply(wrong)[0], final_answer(wrong, whole=True)
    if attempt is None or answer is None or final is None or exact(answer, final):
        return None
    attempt = tidy(split_reply(attempt)[0] if attempt.lstrip().startswith("<think>") else attempt)
    doubt = DOUBTS[language][pick % len(DOUBTS[language])].format(answer=answer)
    whole = by_rules(right, language)
    return Readable(f"{attempt}\n\n{doubt}\n\n{whole.thought}", whole.content)


def rewritten(reply: Reply, original: str) -> Readable | None:
    """What a rewriter made of a reply; None where it left the form, or changed the answer."""
    found = _REWRITTEN.fullmatch(reply.content)
    if found is None or reply.finish_reason != "stop":
        return None
    answer, new = final_answer(original, whole=True), final_answer(found[2])
    if answer is None or not exact(new, answer):
        return None
    return Readable(tidy(found[1]), tidy(found[2]))


class ColdStart:
    """The stage. folder: its own, with the samples of R1-Zero in `samples`; prompts: their files."""

    def __init__(
        self, section: ColdStartSection, folder: Path, prompts: Sequence[str], seed: int, progress: Progress
    ) -> None:
        self.section, self.folder, self.seed, self.progress = section, folder, seed, progress
        self.samples = folder / "samples"
        self.prompts = {prompt.id: prompt for prompt in load_prompts(prompts, section.limit)}

    def write(self, rewriter: Completer | None, stop_token_ids: tuple[int, ...] = ()) -> dict[str, Any]:
        """Write cold_start.jsonl, and report.json, which says that it is whole. Returns the report."""
        traces = _rows(self.samples / TRACES)
        made = self._rewrite(traces, rewriter, stop_token_ids) if rewriter is not None else {}
        rows = [self._row(trace, made.get(_key(trace))) for trace in traces]
        corrections = self._corrections(traces)
        with atomic_write(self.folder / ROWS, "w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows + corrections)
        report = {
            "prompts": len(_rows(self.samples / PASS_RATES)),
            "from_zero": len(rows),
            "rewritten_by_model": len(made),
            "rewritten_by_rules": len(rows) - len(made),
            "corrections": len(corrections),
            "wanted": self.section.minimum,
            "too_few": len(rows) < self.section.minimum,
        }
        with atomic_write(self.folder / REPORT, "w") as file:
            json.dump(report, file, indent=1)
        if report["too_few"]:
            self.progress.say(
                f"R1-Zero gives only {len(rows):,} right and readable samples, {self.section.minimum:,} are wanted: "
                "going on with the given cold-start data"
            )
        return report

    def _row(self, trace: Mapping[str, Any], made: Readable | None) -> dict[str, Any]:
        prompt = self.prompts[trace["provenance"]["prompt"]]
        readable = made or by_rules(_text(trace), language_of(prompt))
        return _conversation(trace, readable, "rewriter" if made else "rules")

    def _rewrite(
        self, traces: Sequence[Mapping[str, Any]], rewriter: Completer, stop_token_ids: tuple[int, ...]
    ) -> dict[tuple[str, int], Readable]:
        """What the rewriter made of the traces, by key; each is asked for once, also when a run is interrupted."""
        log = WorkLog(self.folder, REWRITES, KEYS)
        done = log.places()
        waiting = [trace for trace in traces if _key(trace) not in done]
        texts = [f"{REWRITE}\n\nProblem:\n{_question(t)}\n\nNotes:\n{_reply(t)['reasoning_content']}\n\n"
                 f"Answer:\n{_reply(t)['content']}" for t in waiting]  # fmt: skip
        params = self.section.rewriter_sampling.params(self.seed)
        kept = 0
        with log.open():

            def keep(index: int, reply: Reply) -> None:
                nonlocal kept
                prompt, seed = _key(waiting[index])
                log.append({"prompt": prompt, "seed": seed, "text": reply.text, "finish_reason": reply.finish_reason})
                kept += 1
                self.progress.show(f"rewriting: {kept:,} of {len(waiting):,} traces", final=kept == len(waiting))

            conversations = [[{"role": "user", "content": text}] for text in texts]
            rewriter.complete(conversations, replace(params, stop_token_ids=stop_token_ids), keep)
        found = {}
        by_key = {_key(trace): trace for trace in traces}
        for record in log.read(log.places().values()):
            trace = by_key.get((record["prompt"], record["seed"]))
            reply = Reply(record["text"], *split_reply(record["text"]), record["finish_reason"], 0)
            if trace is not None and (made := rewritten(reply, _text(trace))) is not None:
                found[_key(trace)] = made
        self.progress.say(f"rewriting: {len(found):,} of {len(traces):,} traces; the others go by rules")
        return found

    def _corrections(self, traces: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One correction at most for each prompt that has a right and a wrong sample."""
        wanted = round(self.section.corrections * len(traces))
        right: dict[str, Mapping[str, Any]] = {}
        for trace in traces:
            right.setdefault(trace["provenance"]["prompt"], trace)
        rows: list[dict[str, Any]] = []
        for prompt_id, seed, text in self._wrong(right) if wanted else []:
            if len(rows) == wanted:
                break
            if prompt_id not in right:  # it has its correction
                continue
            trace = right[prompt_id]
            pick = hashlib.sha256(f"{prompt_id} {seed}".encode()).digest()[0]
            readable = corrected(text, _text(trace), language_of(self.prompts[prompt_id]), pick)
            if readable is not None:
                rows.append(_conversation(trace, readable, "correction", {"wrong_seed": seed}))
                del right[prompt_id]
        return rows

    def _wrong(self, right: Mapping[str, Any]) -> list[tuple[str, int, str]]:
        """(prompt, seed, text) of the samples that are well formed and wrong, of prompts with a right one."""
        samples = WorkLog(self.samples, SAMPLES, KEYS)
        scores = scores_log(self.samples, self.section.rewards)
        judged, places = scores.places(), samples.places()
        names = [reward.name for reward in self.section.rewards]
        found = []
        for key in judged:
            if key[0] not in right or key not in places:
                continue
            (score,), (record,) = scores.read([judged[key]]), samples.read([places[key]])
            verdict = is_right(record["finish_reason"], score["rewards"], names, self.section.filter.minimum)
            if verdict is False and r1_zero_format(record["text"]):
                found.append((record["prompt"], record["seed"], record["text"]))
        return found


def _rows(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _reply(trace: Mapping[str, Any]) -> Mapping[str, Any]:
    reply: Mapping[str, Any] = trace["messages"][-1]
    return reply


def _question(trace: Mapping[str, Any]) -> str:
    return str(trace["messages"][-2]["content"])


def _text(trace: Mapping[str, Any]) -> str:
    """The reply of a trace as it was written."""
    reply = _reply(trace)
    return f"<think>\n{reply.get('reasoning_content', '')}\n</think>\n\n{reply['content']}"


def _key(trace: Mapping[str, Any]) -> tuple[str, int]:
    return trace["provenance"]["prompt"], trace["provenance"]["seed"]


def _conversation(
    trace: Mapping[str, Any], readable: Readable, by: str, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    reply = {"role": "assistant", "content": readable.content, "reasoning_content": readable.thought}
    provenance = {**trace["provenance"], "form": by, **(more or {})}
    return {**trace, "messages": [*trace["messages"][:-1], reply], "provenance": provenance}
