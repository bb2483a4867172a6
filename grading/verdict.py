"""What a grader says about one answer."""

from enum import StrEnum


class Verdict(StrEnum):
    """TIMEOUT: comparing took too much time or memory, so nobody knows. MISSING: there was no answer to compare."""

    RIGHT = "right"
    WRONG = "wrong"
    TIMEOUT = "timeout"
    MISSING = "missing"
