"""Scoring a few texts with the rewards of training."""

from typing import Any

from dsv3.training.rewards.registry import Rewards, RewardSection, Scores, build

PROMPT = [{"role": "user", "content": "What is 3+8-5?"}]
RIGHT = "<think>3+8=11, then 11-5=6, so 6</think>\n\n6"


def scored(rewards: Rewards, *texts: str, **columns: Any) -> Scores:
    """Scores of the texts; a column is one value for all of them, or a list."""
    n = len(texts)
    given: dict[str, Any] = {"completion_ids": [[0] * 10] * n, "finish_reasons": ["stop"] * n}
    given |= {name: value if isinstance(value, list) else [value] * n for name, value in columns.items()}
    return rewards.score([PROMPT] * n, list(texts), given)


def one(name: str, **options: Any) -> Rewards:
    return build([RewardSection(name, options=options)])


def score(name: str, text: str, finish_reasons: str = "stop", completion_ids: Any = None, **rest: Any) -> float | None:
    """What one built-in reward gives for one text. rest: options, and columns under their names with a `_` behind."""
    columns = {key[:-1]: [value] for key, value in rest.items() if key.endswith("_")}
    options = {key: value for key, value in rest.items() if not key.endswith("_")}
    with one(name, **options) as rewards:
        found = scored(
            rewards, text, finish_reasons=finish_reasons, completion_ids=[completion_ids or [0] * 10], **columns
        )
    return found.by_name[name][0]
