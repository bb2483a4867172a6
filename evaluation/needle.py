"""Needle in a haystack: a number is hidden at every depth of texts of every length, and asked for at the end.

As in figure 8 of the V3 report, which goes to 128K tokens. The haystack is made-up prose, or text of the user's.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import UserError
from .items import Data, Item, Kind, Task
from .reading import files_below, read_records

LONGEST, SHORTEST, LENGTHS = 131072, 128, 8
DEPTHS = tuple(range(0, 101, 10))
FILES = "nothing: the haystack is made up; or text of your own, as files of .txt, .jsonl or .parquet (column text)"
FRAME = 48  # tokens that question and chat tokens take, at most
REPLY, THOUGHT = 32, 1024  # tokens of room for the reply, without and with a thought
CHARACTERS = 4.0  # per token, where the tokenizer is not here

WHO = "farmer teacher sailor doctor painter baker miller judge clerk singer weaver gardener hunter mason guard cook"
DID = "carried found sold painted mended lost counted hid borrowed washed broke praised wanted bought drew moved"
HOW = "red heavy wooden broken silver narrow old foreign empty yellow square bright plain costly round torn"
WHAT = "basket lamp ladder coat bell table wheel letter boat chair kettle clock barrel mirror rope saddle"
WHERE = "market river harbour bridge church forest station garden mill square tower road field inn well school"
CITIES = "Lisbon Oslo Kyoto Quito Cairo Vienna Dublin Hanoi Accra Lima Riga Perth"


def default_lengths(context: int) -> list[int]:
    """The context, at most 128K, halved down to 128 tokens, at most eight times; the shortest first."""
    lengths = [min(context, LONGEST)]
    while len(lengths) < LENGTHS and lengths[-1] // 2 >= SHORTEST:
        lengths.append(lengths[-1] // 2)
    return lengths[::-1]


def needle_task(
    lengths: Sequence[int],
    context: int | None,
    thinks: bool,
    count: Callable[[str], int] | None,
    seed: int,
    haystack: Path | None = None,
) -> tuple[Task, Data]:
    """The task for prompts of these many tokens.

    context: tokens of prompt and reply together; the longest prompts leave room for the reply. count: tokens of a text;
    None: estimated at four characters each.
    Raises UserError for lengths beyond the context, and for a haystack that is too short.
    """
    room = THOUGHT if thinks else REPLY
    if context is not None:
        room = min(room, context // 4)
    for length in lengths:
        if length < SHORTEST or (context is not None and length > context):
            raise UserError(f"needle: {length} tokens; lengths go from {SHORTEST} to the context of {context}")
    measure = count or (lambda text: round(len(text) / CHARACTERS))
    sentences = _sentences(haystack, max(lengths), measure, seed)
    items = []
    for length in lengths:
        most = length if context is None else min(length, context - room)
        for depth in DEPTHS:
            items.append(_item(sentences, length, depth, max(0, most - FRAME), measure, seed))
    notes = [] if haystack else ["the haystack is made-up prose; give --data needle=TEXT for another"]
    notes += [] if count else ["lengths are estimated at four characters a token"]
    task = Task(
        "needle",
        "Needle in a haystack",
        Kind.FIND,
        FILES,
        read=lambda path: data,
        ask=lambda item: f"{item.question}\n\nThe secret number of {item.extra['city']} is",
        tell=lambda item: f" {item.gold}",
        chat=lambda item: (
            f"{item.question}\n\nWhat is the secret number of {item.extra['city']}? Give the number only."
        ),
        stop=("\n",),
        tokens=REPLY,
    )
    data = Data(items, notes=tuple(notes))
    return task, data


def _item(
    sentences: Sequence[tuple[str, int]], length: int, depth: int, room: int, measure: Callable[[str], int], seed: int
) -> Item:
    generator = random.Random(f"{seed}/{length}/{depth}")
    city, number = generator.choice(CITIES.split()), str(generator.randrange(1_000_000, 10_000_000))
    needle = f"The secret number of {city} is {number}."
    room -= measure(needle)
    start = generator.randrange(len(sentences))
    chosen, used = [], 0
    for step in range(len(sentences)):
        text, size = sentences[(start + step) % len(sentences)]
        if used + size > room:
            break
        chosen.append((text, size))
        used += size
    place, before = 0, 0
    while place < len(chosen) and before + chosen[place][1] / 2 < used * depth / 100:
        before += chosen[place][1]
        place += 1
    texts = [text for text, _ in chosen]
    story = " ".join([*texts[:place], needle, *texts[place:]])
    return Item(f"{length}/{depth}", story, number, (), str(length), {"city": city, "depth": depth})


def _sentences(haystack: Path | None, tokens: int, measure: Callable[[str], int], seed: int) -> list[tuple[str, int]]:
    """Sentences with their lengths, enough for so many tokens."""
    found, total = [], 0
    for text in _made_up(seed) if haystack is None else _own(haystack):
        size = measure(f" {text}")
        found.append((text, size))
        total += size
        if total >= tokens:
            return found
    raise UserError(f"needle: {haystack} has {total} tokens, fewer than the {tokens} asked for; give more text")


def _made_up(seed: int) -> Iterator[str]:
    generator = random.Random(seed)
    who, did, how, what, where = (words.split() for words in (WHO, DID, HOW, WHAT, WHERE))
    pick = generator.choice
    while True:
        yield f"The {pick(who)} {pick(did)} the {pick(how)} {pick(what)} near the {pick(where)}."


def _own(path: Path) -> Iterator[str]:
    if not path.exists():
        raise UserError(f"needle: {path} does not exist; expected {FILES}")
    for file in files_below(path):
        for record in read_records(file):
            for line in record.text("text").split("\n"):
                if line.strip():
                    yield line.strip()
