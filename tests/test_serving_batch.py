"""The tensors of a step: what is kept from step to step and built in short ways is what would be built anew."""

from dataclasses import fields
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import CONFIG
from torch import Tensor

from dsv3.core.generate import SamplingParams
from dsv3.serving.batch import Form, build, decoding, mixed
from dsv3.serving.request import Request
from dsv3.serving.rows import Rows
from dsv3.serving.scheduler import Work
from dsv3.serving.step import Edits, Group, StepInput

SOME = settings(deadline=None, max_examples=40)
PAGE, PAGES = 4, 16
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_k=st.sampled_from([0, 3]),
    tempered_logprobs=st.booleans(),
    top_logprobs=st.integers(0, 3),
    prompt_logprobs=st.booleans(),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([{}, {3: 1.5}]),
)
LENGTHS = st.tuples(st.integers(1, 30), st.integers(1, 30))  # of a prompt, and of what was generated


def requests(drawn: list[tuple[tuple[int, int], SamplingParams]], first: int = 0) -> list[Request]:
    """Running ones, with their whole text known and a cache that holds it."""
    made = []
    for row, ((prompt, generated), params) in enumerate(drawn, first):
        request = Request(row, [(7 * i + row) % 50 for i in range(prompt)], params, 64, row)
        request.tokens += [(5 * i + row) % 50 for i in range(generated)]
        request.row, request.running = row, True
        request.blocks = list(range(PAGES * row, PAGES * row - (-len(request.tokens) // PAGE)))
        made.append(request)
    return made


def newest(request: Request) -> Work:
    return Work(request, len(request.tokens) - 1, 1, True)


def rows_of(some: list[Request]) -> Rows:
    rows = Rows(16, PAGES, PAGE)
    for request in some:
        request.synced = 0
        rows.update(request)
    return rows


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Names of what differs, in dtype, shape or value."""
    if isinstance(one, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        return [] if same else [name]
    if isinstance(one, list):
        pairs = zip(one, other, strict=True)
        return [text for i, pair in enumerate(pairs) for text in differences(*pair, f"{name}.{i}")]
    if isinstance(one, StepInput | Group | Edits) and other is not None:
        return [text for f in fields(one) for text in differences(getattr(one, f.name), getattr(other, f.name), f.name)]
    return [] if one == other else [name]


@SOME
@given(st.lists(st.tuples(LENGTHS, PARAMS), min_size=1, max_size=5), st.booleans(), st.integers(0, 2))
def test_steps_that_only_decode_are_built_in_a_short_way_to_the_same_tensors(drawn, per_token, drafted):
    some = requests(drawn)
    rows, works = rows_of(some), [newest(request) for request in some]
    form = Form.of(CONFIG)
    if drafted and not per_token and all(form.absorbs(work.start, 1 + drafted) for work in works):
        for work in works:
            work.request.draft, work.count = [1, 2, 3][:drafted], 1 + drafted
            work.request.blocks.append(PAGES * work.request.row + PAGES - 1)
        rows = rows_of(some)
    whole, order = mixed(works, [(1, 2)], rows, CONFIG, per_token)
    assert order == works
    assert differences(decoding(works, [(1, 2)], rows, CONFIG.vocab_size), whole) == []


@SOME
@given(st.lists(st.tuples(LENGTHS, PARAMS), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 2))
def test_a_step_survives_the_way_to_another_process(drawn, drafted, prompts):
    some = requests(drawn)
    works = [newest(request) for request in some]
    for work in works[prompts:]:
        if not work.request.params.penalized:
            work.request.draft = [1, 2, 3][:drafted]
            work.count += len(work.request.draft)
            work.request.blocks.append(PAGES * work.request.row + PAGES - 1)
    for work in works[:prompts]:
        work.start, work.count = 0, len(work.request.tokens)
    step, _ = build(works, [], Rows(16, PAGES, PAGE), CONFIG, False)
    assert differences(step, StepInput.unpacked(step.packed())) == []


@SOME
@given(st.lists(st.tuples(LENGTHS, PARAMS), min_size=3, max_size=3), st.data())
def test_what_is_kept_of_the_step_before_is_never_stale(drawn, data):
    """Requests come, go, take blocks, and take the rows of others."""
    rows, some = Rows(16, PAGES, PAGE), requests(drawn)
    for _ in range(4):
        chosen = data.draw(st.permutations(some))[: data.draw(st.integers(1, 3))]
        step, _ = build([newest(request) for request in chosen], [], rows, CONFIG, False)
        fresh, _ = build([newest(request) for request in chosen], [], rows_of(chosen), CONFIG, False)
        for one in (step, fresh):  # behind what a request holds, its row may say anything
            one.table[torch.arange(one.table.shape[1]) >= one.room[:, None] // PAGE] = 0
        assert differences(step, fresh) == []
        grown = data.draw(st.sampled_from(some))
        grown.tokens.append(9)
        if len(grown.tokens) > PAGE * len(grown.blocks):
            grown.blocks.append(PAGES * grown.row + len(grown.blocks))
        place = data.draw(st.integers(0, 2))
        if data.draw(st.booleans()):
            some[place] = requests([data.draw(st.tuples(LENGTHS, PARAMS))], place)[0]
