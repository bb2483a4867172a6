"""Samples are packed tightly, shared fairly and seen once an epoch; what is collated is what the model must read."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.parallel.data import DataParallel
from dsv3.training.chat_data import ChatRow, Example
from dsv3.training.progress import Progress
from dsv3.training.sft.config import SftBatchSection, SftDataSection
from dsv3.training.sft.packing import Packed, Plan, best_fit, collate, passes, share, token_weights
from dsv3.training.sft.samples import Recipe, Samples, prepare_samples

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)
quick = settings(max_examples=100, deadline=None)


# --- packing ---


def by_definition(lengths: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    rooms: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [place for place, room in enumerate(rooms) if room >= lengths[item]]
        place = min(fitting, key=lambda place: rooms[place], default=len(bins))
        if place == len(bins):
            bins, rooms = [*bins, []], [*rooms, capacity]
        bins[place].append(item)
        rooms[place] -= lengths[item]
    return bins


@quick
@given(LENGTHS, st.integers(40, 100))
def test_best_fit_leaves_the_least_room(lengths: list[int], capacity: int) -> None:
    bins = best_fit(lengths, capacity)
    assert sorted(item for row in bins for item in row) == list(range(len(lengths)))
    expected = by_definition(lengths, capacity)
    filled = [Counter(sum(lengths[item] for item in row) for row in rows) for rows in (bins, expected)]
    assert filled[0] == filled[1]


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(UserError, match="41 tokens does not fit into a row of 40"):
        best_fit([3, 41], 40)


@quick
@given(LENGTHS, st.integers(1, 7), st.booleans())
def test_an_epoch_shows_every_sample_once(lengths: list[int], units: int, rows: bool) -> None:
    batch = SftBatchSection(samples=0, tokens=units * 50) if rows else SftBatchSection(samples=units)
    plan = Plan(np.array(lengths), batch, 50, 3.0, 0, seed=3)
    seen: list[int] = []
    for step in itertools.count():
        if len(seen) >= 3 * len(lengths):
            break
        chosen = plan.step(step)
        assert len(chosen) == units
        assert not rows or all(sum(lengths[sample] for sample in row) <= 50 for row in chosen)
        seen += [sample for unit in chosen for sample in unit.tolist()]
    for epoch in range(3):
        part = seen[epoch * len(lengths) : (epoch + 1) * len(lengths)]
        assert sorted(part) == list(range(len(lengths)))


def test_a_plan_follows_from_the_seed_and_needs_no_history() -> None:
    def steps(seed: int, order: list[int]) -> dict[int, list[list[int]]]:
        plan = Plan(np.arange(1, 30), SftBatchSection(samples=0, tokens=90), 30, 4.0, 0, seed)
        return {step: [unit.tolist() for unit in plan.step(step)] for step in order}

    forward = steps(0, list(range(20)))
    assert steps(0, [19, 3, 11]) == {step: forward[step] for step in (19, 3, 11)}
    assert steps(1, [0])[0] != forward[0]


def test_the_length_of_a_run_is_its_epochs_to_the_nearest_step_or_its_steps() -> None:
    lengths = np.full(100, 10)

    def total(epochs: float, steps: int = 0, **batch: int) -> int:
        return Plan(lengths, SftBatchSection(**batch), 30, epochs, steps, 0).total_steps

    assert total(2.0, samples=48) == 4  # 200 / 48
    assert total(3.456, samples=48) == 7
    assert total(0.01, samples=48) == 1
    assert total(2.0, steps=360, samples=48) == 360
    assert total(1.0, samples=0, tokens=60) == 17  # 34 rows, of three samples each but for the last
    assert Plan(lengths, SftBatchSection(samples=48), 30, 2.0, 0, 0).epoch(3) == pytest.approx(1.44)


@quick
@given(LENGTHS, st.integers(1, 8))
def test_processes_share_a_batch_by_tokens(lengths: list[int], world: int) -> None:
    shares = [share(lengths, rank, world) for rank in range(world)]
    assert sorted(item for mine in shares for item in mine) == list(range(len(lengths)))
    if len(lengths) >= world:
        assert all(shares)
    loads = [sum(lengths[item] for item in mine) for mine in shares]
    assert max(loads) - min(loads) <= max(lengths)


@quick
@given(LENGTHS, st.integers(1, 120))
def test_a_pass_holds_samples_of_like_length_within_the_budget(lengths: list[int], budget: int) -> None:
    cut = passes(np.arange(len(lengths)), np.array(lengths), budget)
    order = [sample for part in cut for sample in part.tolist()]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[sample] for sample in order] == sorted(lengths, reverse=True)
    assert all(len(part) == 1 or sum(lengths[sample] for sample in part) <= budget for part in cut)
    for part, after in itertools.pairwise(cut):
        assert sum(lengths[sample] for sample in part) + lengths[after[0]] > budget


# --- samples on disk ---


class Letters:
    """A sample for each message: its letters, of which the capital ones are to be learnt."""

    tokenizer, context = None, 100

    def __init__(self, fingerprint: str = "letters") -> None:
        self.fingerprint, self.rows = fingerprint, 0

    def encode(self, row: ChatRow) -> list[Example]:
        self.rows += 1
        texts = [message["content"] for message in row.messages]
        return [Example([ord(c) for c in text], [c.isupper() for c in text]) for text in texts]


def stored(folder: Path, texts: list[list[str]], encoder: Letters | None = None, **data: object) -> dict[str, Samples]:
    file = folder / "a.jsonl"
    rows = [{"messages": [{"role": "user", "content": text} for text in row]} for row in texts]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if not file.exists() or file.read_text() != lines:
        file.write_text(lines)
    recipe = Recipe(SftDataSection(train=(str(file),), **data), encoder or Letters(), seed=0)
    sets, _ = prepare_samples(recipe, folder, DataParallel(), Progress(False))
    return sets


def test_samples_come_back_as_they_were_encoded(tmp_path: Path) -> None:
    samples = stored(tmp_path, [["aBc", "xYZ"], ["", "nothing"], ["qQ"]])["train"]
    assert len(samples) == 3
    assert samples.lengths.tolist() == [3, 3, 2] and samples.losses.tolist() == [1, 2, 1]
    ids, mask = samples[1]
    assert ids.tolist() == [ord(c) for c in "xYZ"] and mask.tolist() == [False, True, True]
    assert samples.describe().startswith("train: 3 conversations, 3 samples, 8 tokens, 50% of them learnt")
    assert "1 conversations had nothing to learn" in samples.describe()


def test_long_samples_are_dropped_or_cut_and_said_to_be(tmp_path: Path) -> None:
    texts = [["aB"], ["abcdE"], ["aBcdE"]]
    dropped = stored(tmp_path, texts, seq_len=3)["train"]
    assert len(dropped) == 1 and "2 longer than data.seq_len were dropped" in dropped.describe()
    cut = stored(tmp_path, texts, seq_len=3, overlong="cut")["train"]
    assert len(cut) == 2 and cut[1][0].tolist() == [ord(c) for c in "aBc"]
    assert "2 longer than data.seq_len were cut, 1 of them before anything to learn" in cut.describe()


def test_samples_are_encoded_once_and_again_when_anything_changes(tmp_path: Path) -> None:
    encoder = Letters()
    for _ in range(2):
        stored(tmp_path, [["aB"]], encoder)
    assert encoder.rows == 1
    stored(tmp_path, [["aB"], ["aBC"]], encoder)
    assert encoder.rows == 3
    stored(tmp_path, [["aB"], ["aBC"]], encoder, seq_len=2)
    assert encoder.rows == 5
    stored(tmp_path, [["aB"], ["aBC"]], other := Letters("other"), seq_len=2)
    assert other.rows == 2


def test_held_out_conversations_are_not_trained_on(tmp_path: Path) -> None:
    texts = [[f"a{chr(65 + n)}", f"b{chr(65 + n)}"] for n in range(26)]
    sets = stored(tmp_path, texts, held_out=0.3, validation={"more": str(tmp_path / "a.jsonl")})
    names = {
        name: {bytes(samples[i][0].astype(np.uint8)).decode() for i in range(len(samples))}
        for name, samples in sets.items()
    }
    assert names["train"] | names["held-out"] == names["more"] and len(names["more"]) == 52
    assert not {name[1] for name in names["train"]} & {name[1] for name in names["held-out"]}, "by conversation"
    assert 0 < len(names["held-out"]) < 26


def test_nothing_to_learn_and_no_data_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train: no sample is left to learn from \(train: 1 conversations"):
        stored(tmp_path, [["abc"]])
    with pytest.raises(UserError, match=r"data\.train is empty"):
        prepare_samples(Recipe(SftDataSection(), Letters(), 0), tmp_path, DataParallel(), Progress(False))
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: not JSON"):
        recipe = Recipe(SftDataSection(train=(str(tmp_path / "a.jsonl"),)), Letters(), 0)
        prepare_samples(recipe, tmp_path, DataParallel(), Progress(False))


# --- batches ---


def test_a_batch_predicts_the_learnt_tokens_and_nothing_else(tmp_path: Path) -> None:
    samples = stored(tmp_path, [["abCD", "xY"], ["Lmn", "opQ"]])["train"]
    chosen = np.array([0, 1, 2])
    batch = collate(samples, chosen, np.array([0.5, 0.25, 1.0]))
    assert bytes(batch.tokens.tolist()) == b"abCxop", "without last tokens; what only begins with learnt ones is gone"
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6] and batch.max_len == 3 and batch.samples == 3
    assert batch.scored.tolist() == [1, 2, 3, 5] and bytes(batch.targets.tolist()) == b"CDYQ"
    assert batch.weights.tolist() == [0.5, 0.5, 0.25, 1.0]


@pytest.mark.parametrize("normalise", ["tokens", "samples"])
def test_weights_of_a_global_batch_sum_to_one(normalise: str) -> None:
    losses, units = np.array([3, 1, 7, 2]), [np.array([0, 2]), np.array([3])]
    parts = [token_weights(losses, unit, units, normalise) for unit in units]
    assert sum((part * losses[unit]).sum() for part, unit in zip(parts, units, strict=True)) == pytest.approx(1)
    assert len({round(w, 9) for part in parts for w in part}) == (1 if normalise == "tokens" else 3)


def test_a_batch_moves_with_its_numbers() -> None:
    empty = torch.zeros(2, dtype=torch.int64)
    batch = Packed(empty, empty, torch.tensor([0, 2]), 2, empty, empty, torch.ones(2))
    moved = batch.to(torch.device("meta"))
    assert moved.tokens.is_meta and moved.weights.is_meta and moved.max_len == 2
