"""What the rewards say about each sample, kept as it comes: grading code or hard mathematics takes as long as sampling.

scores-HASH.jsonl has one line per finished sample: {"prompt", "seed", "total", "rewards": {name: value or null}}; HASH
stands for the settings of the rewards, so other rewards score anew. Samples that were cut off are not asked about.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...parallel.data import DataParallel
from ..progress import Progress
from ..rewards.registry import Rewards, RewardSection
from .prompts import Prompt, canonical
from .sampling import KEYS
from .worklog import WorkLog

BATCH = 64  # samples that the rewards see at a time


def scores_log(run_dir: Path, rewards: Sequence[RewardSection]) -> WorkLog:
    digest = hashlib.sha256(canonical([section.to_dict() for section in rewards])).hexdigest()[:8]
    return WorkLog(run_dir, f"scores-{digest}", KEYS)


def verify(
    rewards: Rewards,
    prompts: Sequence[Prompt],
    samples: WorkLog,
    scores: WorkLog,
    parallel: DataParallel,
    progress: Progress,
) -> Counter[str]:
    """Score what is not scored yet; this process's share of it. Returns the problems that the rewards had."""
    by_id = {prompt.id: prompt for prompt in prompts}
    done, places = scores.places(), samples.places()
    waiting = parallel.broadcast_object([key for key in places if key not in done and key[0] in by_id])
    mine = [waiting[i] for i in parallel.share(len(waiting))]
    problems: Counter[str] = Counter()
    with scores.open(parallel.rank):
        for start in range(0, len(mine), BATCH):
            records = samples.read(places[key] for key in mine[start : start + BATCH])
            finished = [record for record in records if record["finish_reason"] == "stop"]
            if finished:
                problems += _score(rewards, by_id, finished, scores)
            progress.show(f"verifying: {start + len(records):,} of {len(mine):,} samples", start + BATCH >= len(mine))
    return problems


def _score(
    rewards: Rewards, by_id: Mapping[str, Prompt], records: Sequence[Mapping[str, Any]], scores: WorkLog
) -> Counter[str]:
    chosen = [by_id[record["prompt"]] for record in records]
    names = sorted({name for prompt in chosen for name in prompt.columns})
    columns: dict[str, list[Any]] = {name: [prompt.columns.get(name) for prompt in chosen] for name in names}
    columns["completion_ids"] = [[] for _ in records]  # of a tokenizer that may be elsewhere
    columns["finish_reasons"] = [record["finish_reason"] for record in records]
    found = rewards.score([prompt.messages for prompt in chosen], [record["text"] for record in records], columns)
    for place, record in enumerate(records):
        scores.append(
            {
                "prompt": record["prompt"],
                "seed": record["seed"],
                "total": found.total[place],
                "rewards": {name: values[place] for name, values in found.by_name.items()},
            }
        )
    return found.problems
