"""What a model is shown: few-shot prompts for base models, one message for chat models; and which items."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import UserError
from .items import Data, Item, Task


def limited(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """All items, or `limit` of them drawn by the seed, in the order of the data set."""
    if limit is None or limit >= len(items):
        return list(items)
    if limit < 1:
        raise UserError("--limit must be 1 or more")
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), limit))]


def shots_for(task: Task, data: Data, count: int, seed: int) -> Callable[[Item], list[Item]]:
    """The shots that go before an item. Raises UserError where the data has too few."""
    if count < 0:
        raise UserError("--shots must be 0 or more")
    chosen: dict[str, list[Item]] = {}
    for group, pool in data.shots.items():
        drawn = random.Random(seed).sample(pool, min(count, len(pool))) if data.drawn else list(pool)[:count]
        chosen[group] = drawn

    def shots(item: Item) -> list[Item]:
        found = chosen.get(item.group, chosen.get("", []))
        if len(found) < count:
            what = f" of {item.group}" if item.group and "" not in chosen else ""
            raise UserError(
                f"{task.name}: {count} shots are wanted, and the data has {len(found)}{what}; expected {task.files}; "
                f"or give --shots {len(found)}"
            )
        return found

    return shots


def few_shot(task: Task, item: Item, shots: Sequence[Item]) -> str:
    """The prompt of a base model."""
    shown = "".join(f"{task.ask(shot)}{task.tell(shot)}\n\n" for shot in shots)
    return f"{task.header(item)}{shown}{task.ask(item)}"


@dataclass(frozen=True)
class Fitted:
    """A prompt that fits the context. shots: how many are left in it; None: not even the bare question fits."""

    text: str
    tokens: list[int]
    shots: int | None


def fit(task: Task, item: Item, shots: Sequence[Item], tokens: Callable[[str], list[int]], room: int) -> Fitted:
    """The few-shot prompt of at most `room` tokens: shots are dropped from the end until it fits."""
    for count in range(len(shots), -1, -1):
        text = few_shot(task, item, shots[:count])
        ids = tokens(text)
        if len(ids) <= room:
            return Fitted(text, ids, count)
    return Fitted(text, [], None)
