"""What a reward function is, and what the built-in ones have in common."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = Mapping[str, Any]
Row = Mapping[str, Any]
Score = float | None


class RewardFunction(Protocol):
    """Scores a batch of completions, one number each; None where it has nothing to say about one.

    prompts: the conversation that each completion answers, in OpenAI's form. completions: whole texts, with a thought
    that the prompt opened, without the end token. columns: lists as long as these; every column of the data, and
    `completion_ids` and `finish_reasons` ("stop" or "length"). A function that names its parameters gets those only.
    It may be a coroutine.
    """

    def __call__(
        self, prompts: list[list[Message]], completions: list[str], **columns: list[Any]
    ) -> Sequence[Score] | Awaitable[Sequence[Score]]: ...


@dataclass(frozen=True)
class Batch:
    """Completions that one function judges, as lists of one length.

    given: what the function's column holds. finished: did the completion end by itself? columns: all of them.
    """

    prompts: list[list[Message]]
    texts: list[str]
    given: list[Any]
    finished: list[bool]
    columns: Mapping[str, list[Any]]

    def __len__(self) -> int:
        return len(self.texts)

    def column(self, name: str) -> list[Any]:
        """A column, or None for each completion where the data has no such column."""
        return self.columns.get(name, [None] * len(self))


class Reward(ABC):
    """A built-in reward function.

    column: the column of the data that it reads; None: none. judges: does it say, of a row with that column, what a
    right reply is? problems: counted while scoring, taken out by whoever runs the function.
    """

    judges = False

    def __init__(self, column: str | None = None) -> None:
        self.column = column
        self.problems: Counter[str] = Counter()

    def __call__(self, prompts: list[list[Message]], completions: list[str], **columns: list[Any]) -> list[Score]:
        """Rows without the function's column get None."""
        given = (
            [None] * len(completions) if self.column is None else columns.get(self.column, [None] * len(completions))
        )
        known = [i for i in range(len(completions)) if self.column is None or given[i] is not None]
        finished = columns.get("finish_reasons", ["stop"] * len(completions))
        batch = Batch(
            [prompts[i] for i in known],
            [completions[i] for i in known],
            [given[i] for i in known],
            [finished[i] != "length" for i in known],
            {name: [column[i] for i in known] for name, column in columns.items()},
        )
        scores: list[Score] = [None] * len(completions)
        for i, score in zip(known, self.score(batch), strict=True):
            scores[i] = score
        return scores

    @abstractmethod
    def score(self, batch: Batch) -> list[Score]:
        """A score for each completion of the batch."""

    def useless(self, given: Sequence[Any]) -> tuple[int, str] | None:
        """The first of these values of its column that is of no use, and what is wrong with it."""
        return None

    def close(self) -> None:
        """End processes that were started."""
