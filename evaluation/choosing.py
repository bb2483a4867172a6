"""Multiple choice for base models: the letter that is likeliest behind the question and a few answered ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..grading.verdict import Verdict
from .clock import Clock
from .items import Item, Task
from .likelihood import Request, Score
from .prompting import Fitted, fit
from .scoring import Grade
from .store import Key, Store, digest
from .subject import Progress, Subject

LETTER = 8  # most tokens that a letter takes, spaces and brackets included
TAIL = 32  # characters of the prompt that may change how the letter behind it is cut into tokens


@dataclass(frozen=True)
class Question:
    """endings: ids of each letter, as it would follow the prompt."""

    item: Item
    prompt: Fitted
    endings: tuple[tuple[int, ...], ...]
    key: Key


def questions(
    subject: Subject,
    task: Task,
    items: Sequence[Item],
    shots: Callable[[Item], Sequence[Item]],
    settings: dict[str, Any],
) -> list[Question]:
    """What to score for each item. The subject must have likelihoods."""
    assert subject.likelihood is not None
    letters: dict[tuple[str, str], tuple[int, ...]] = {}
    found = []
    for item in items:
        prompt = fit(task, item, shots(item), subject.document, subject.likelihood.context - LETTER)
        for letter in item.letters:
            place = prompt.text[-TAIL:], task.lead + letter
            if place not in letters:
                letters[place] = _behind(subject, *place)
        endings = tuple(letters[prompt.text[-TAIL:], task.lead + letter] for letter in item.letters)
        key = item.id, 0, digest([settings, prompt.tokens, endings])
        found.append(Question(item, prompt, endings, key))
    return found


def _behind(subject: Subject, text: str, more: str) -> tuple[int, ...]:
    """Ids of `more` where it follows `text`: a tokenizer may cut it otherwise than alone."""
    before, both = subject.tokens(text) or [], subject.tokens(text + more) or []
    return tuple(both[len(before) :] if both[: len(before)] == before else subject.tokens(more) or [])


def choose(
    subject: Subject, name: str, asked: Sequence[Question], store: Store, progress: Progress
) -> dict[str, list[Grade]]:
    """A grade for each item, by its id. Scores that the store has are not computed again."""
    assert subject.likelihood is not None
    fitting = [question for question in asked if question.prompt.shots is not None]
    missing = [question for question in fitting if store.get(question.key) is None]
    requests = [Request(tuple(q.prompt.tokens), ending) for q in missing for ending in q.endings]
    owners = [(question, letter) for question in missing for letter in range(len(question.endings))]
    found: dict[str, dict[int, float]] = {question.item.id: {} for question in missing}
    clock = Clock(name, len(fitting), len(fitting) - len(missing), "questions", progress)

    def keep(index: int, score: Score) -> None:
        question, letter = owners[index]
        scores = found[question.item.id]
        scores[letter] = score.logprob
        if len(scores) == len(question.endings):
            length = len(question.prompt.tokens)
            seconds = clock.tick(length)
            values = [scores[i] for i in range(len(scores))]
            store.add(question.key, {"logprobs": values, "tokens": length, "seconds": round(seconds, 4)})

    subject.likelihood.score(requests, keep)
    clock.finish()
    return {question.item.id: [_grade(question, store.get(question.key))] for question in asked}


def _grade(question: Question, row: dict[str, Any] | None) -> Grade:
    if row is None:
        return Grade(Verdict.MISSING, None)
    values = row["logprobs"]
    letter = question.item.letters[values.index(max(values))]
    return Grade(Verdict.RIGHT if letter == question.item.gold else Verdict.WRONG, letter)
