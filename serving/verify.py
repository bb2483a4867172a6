"""`verify`: several samples of one chat, and the answer that most of them give.

A majority over final answers (a box, an `<answer>`, or a short reply as a whole) is right more often than one sample,
where answers are short and can be compared: sums, choices, facts. It says nothing of prose.
"""

from collections.abc import Sequence

from msgspec import Struct

from ..grading.answers import exact, final_answer


class Verification(Struct):
    """How the returned answer was decided. agreement: the share of the samples that gave it. votes: samples per answer,
    as the first that gave it wrote it."""

    samples: int
    agreement: float
    votes: dict[str, int]


def decide(replies: Sequence[str]) -> tuple[int, Verification]:
    """(the first reply with the answer of the majority, how it was decided). Of answers equally frequent the earliest
    wins; with no answer in any reply, the first reply, with an agreement of 0."""
    voters: dict[str, list[int]] = {}
    for index, reply in enumerate(replies):
        answer = final_answer(reply, whole=True)
        if answer is None:
            continue
        known = next((other for other in voters if exact(answer, other)), answer)
        voters.setdefault(known, []).append(index)
    votes = {answer: len(indices) for answer, indices in voters.items()}
    if not voters:
        return 0, Verification(len(replies), 0.0, votes)
    winner = max(voters.values(), key=len)
    return winner[0], Verification(len(replies), len(winner) / len(replies), votes)
