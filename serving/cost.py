"""What a step costs, so that a long prompt does not make everyone else wait.

A chunk of n tokens behind `start` others takes about n (a + b (start + n / 2)) seconds: products cost the same for
every token, attention grows with what it looks at. A budget of tokens would be wrong: at 128K of context the same 2,048
tokens take nine times as long as at the beginning (DeepSeek-V3 on 8 H200, by the roofline: 473 against 50 ms).
"""

from dataclasses import dataclass
from math import inf, sqrt

MOST = 2.0**31  # tokens: no bound at all


@dataclass(frozen=True)
class CostModel:
    """Seconds. step: of any step, however small. token: of a token without context (a). context: per token and token of
    its context (b)."""

    step: float = 0.0
    token: float = 1e-3
    context: float = 0.0

    def of_chunk(self, start: int, count: int) -> float:
        """Of `count` tokens behind `start`, besides `step`."""
        return count * (self.token + self.context * (start + count / 2))

    def tokens_within(self, seconds: float, start: int) -> int:
        """The most tokens behind `start` that take no longer."""
        if seconds <= 0:
            return 0
        if seconds == inf:
            return int(MOST)
        each = self.token + self.context * start
        return int(min(2 * seconds / (each + sqrt(each * each + 2 * self.context * seconds)), MOST))
