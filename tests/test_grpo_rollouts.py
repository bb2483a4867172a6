"""Samples hold the tokens that were written and read, as they were; tools and environments answer what was said."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import random_model
from tiny_model import CONFIG, CONTEXT, TOKENIZER

from dsv3 import backends
from dsv3.core.encoding import encode_chat
from dsv3.core.generate import Completion, SamplingParams, SimpleRollout, Token
from dsv3.core.messages import Call
from dsv3.core.special_tokens import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, TOOL_SEP
from dsv3.core.step import Routing, packed
from dsv3.errors import UserError
from dsv3.training.grpo.environment import Opening, OwnEnvironment, Reply, SingleTurn
from dsv3.training.grpo.prompts import PLAIN, PromptFormat, PromptSet, messages_of
from dsv3.training.grpo.rollouts import Rollouts, completion_seed
from dsv3.training.grpo.sample import Sample
from dsv3.training.grpo.tools import ToolEnvironment, describe, read_reply

MODEL = random_model(CONFIG, 0)
PARAMS = SamplingParams(temperature=1.0, max_tokens=9, tempered_logprobs=True)
ROWS = [{"prompt": "a cat " * n, "answer": str(n)} for n in (1, 5, 2, 9)]


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with backends.use_backend("cpu"):
        yield


def rollouts(
    rollout: Any = None, format: str = "v3", tokens_at_once: int = 10_000, context: int = CONTEXT, **options: Any
) -> Rollouts:
    rollout = rollout or SimpleRollout(MODEL)
    return Rollouts(rollout, PromptFormat(TOKENIZER, format), context, tokens_at_once, **options)


# --- one turn ---


def test_groups_hold_what_the_model_wrote() -> None:
    groups = rollouts(record_experts=True).groups(list(enumerate(ROWS)), 3, PARAMS, seed=7)
    assert [group.index for group in groups] == [0, 1, 2, 3]
    for group in groups:
        assert len(group.samples) == 3 and len({tuple(sample.token_ids) for sample in group.samples}) == 3
        for sample in group.samples:
            prompt = TOKENIZER.encode_segments(encode_chat(group.messages, "v3"))
            assert sample.token_ids[: sample.prompt_length] == prompt
            assert len(sample.completion_ids) == len(sample.logprobs) == len(sample.written) <= 9 and all(
                sample.written
            )
            assert sample.truncated == (TOKENIZER.eos_id not in sample.completion_ids)
            assert sample.text == TOKENIZER.decode(
                [t for t in sample.completion_ids if t != TOKENIZER.eos_id], skip_special=True
            )
            assert sample.experts is not None and len(sample.experts) == len(sample.token_ids) - 1


def test_log_probabilities_and_experts_are_those_of_the_model() -> None:
    (group,) = rollouts(record_experts=True).groups([(0, ROWS[1])], 2, PARAMS, seed=1)
    for sample in group.samples:
        routing = Routing()
        tokens = torch.tensor(sample.token_ids)
        with torch.no_grad():
            logp = MODEL(tokens[None, :-1], routing=routing).logits[0].log_softmax(-1)
        own = logp[torch.arange(len(tokens) - 1), tokens[1:]][sample.prompt_length - 1 :]
        torch.testing.assert_close(torch.tensor(sample.logprobs), own, rtol=1e-4, atol=1e-4)
        chosen = torch.stack([routing.experts[layer] for layer in sorted(routing.experts)], 1)
        assert sample.experts is not None and torch.equal(sample.experts, chosen)


def test_a_completion_depends_on_nothing_but_its_place_in_the_run() -> None:
    """Not on its batch, nor on the process that writes it."""
    whole = rollouts().groups(list(enumerate(ROWS)), 4, PARAMS, seed=3)
    for index, row in enumerate(ROWS):
        (alone,) = rollouts(tokens_at_once=40).groups([(index, row)], 4, PARAMS, seed=3)
        assert [s.token_ids for s in alone.samples] == [s.token_ids for s in whole[index].samples]
    (other,) = rollouts().groups([(0, ROWS[0])], 4, PARAMS, seed=4)
    assert [s.token_ids for s in other.samples] != [s.token_ids for s in whole[0].samples]


def test_no_two_completions_share_a_seed() -> None:
    seeds = {completion_seed(0, index, member) for index in range(50) for member in range(16)}
    assert len(seeds) == 800 and all(0 <= seed < 2**63 for seed in seeds)


def test_the_prompt_of_a_group_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    forward = type(MODEL).forward

    def counting(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        read.append(input_ids.shape[0])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(MODEL), "forward", counting)
    groups = rollouts(record_experts=True).groups(list(enumerate(ROWS)), 8, PARAMS, seed=0)
    assert read[0] == sum(group.samples[0].prompt_length for group in groups)
    assert read[1] == 32


class Noted:
    """A rollout that notes how much it was asked for at a time."""

    weight_version = 0

    def __init__(self) -> None:
        self.inner, self.asked = SimpleRollout(MODEL), []

    def generate(self, prompts: Sequence[list[int]], params: Any, **options: Any) -> list[Completion]:
        self.asked.append(sum(len(p) + one.max_tokens for p, one in zip(prompts, params, strict=True)))
        return self.inner.generate(prompts, params, **options)


def test_so_many_tokens_at_once_and_no_more() -> None:
    noted = Noted()
    rollouts(noted, tokens_at_once=70).groups(list(enumerate(ROWS)), 4, PARAMS, seed=0)
    assert len(noted.asked) > 3 and max(noted.asked) <= 70


def test_the_plain_template_is_that_of_the_report() -> None:
    ids = PromptFormat(TOKENIZER, "r1-zero").encode([{"role": "user", "content": "1 + 1?"}])
    assert ids[0] == TOKENIZER.bos_id and TOKENIZER.decode(ids[1:]) == PLAIN.replace("{prompt}", "1 + 1?")
    with pytest.raises(UserError, match="holds one question of a user"):
        PromptFormat(TOKENIZER, "r1-zero").encode(
            [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
        )


# --- prompts ---


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 20), seed=st.integers(0, 100))
def test_every_epoch_asks_every_prompt_once_in_another_order(count: int, seed: int) -> None:
    prompts = PromptSet([{"prompt": str(n)} for n in range(count)])
    epochs = [[prompts.at(epoch * count + i, seed) for i in range(count)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 6 or epochs[0] != epochs[1]
    assert [prompts.at(i, seed) for i in range(count)] == epochs[0]  # asked again, behind others


def test_prompts_are_read_from_parquet_too(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [{"prompt": [{"role": "user", "content": "1 + 1", "name": None}], "answer": "2"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"prompt": "2 + 2", "answer": "4"}\n')
    found = PromptSet.load([str(tmp_path)])
    assert [row["answer"] for row in found.rows] == ["2", "4"]
    assert found.rows[0]["prompt"] == [{"role": "user", "content": "1 + 1"}]
    assert found.places[1].endswith("b.jsonl, line 1")


# --- several turns ---


class Scripted:
    """A rollout that says what it is told to, one text after the other for every episode, and notes what it read."""

    weight_version = 5

    def __init__(self, *turns: list[int]) -> None:
        self.turns, self.read, self.at = turns, [], 0

    def generate(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], on_token: Any = None, **options: Any
    ) -> list[Completion]:
        self.read.append([list(prompt) for prompt in prompts])
        wanted = self.turns[self.at]
        self.at += 1
        result = []
        for prompt, one in zip(prompts, params, strict=True):
            assert one.max_tokens is not None
            ids = wanted[: one.max_tokens]
            experts = torch.full((len(prompt) + len(ids) - 1, 1, 2), self.at, dtype=torch.int32)
            done = "stop" if len(ids) == len(wanted) else "length"
            result.append(Completion(list(prompt), 0, self.weight_version, ids, [-0.5] * len(ids), done, experts))
        return result

    def weights_changed(self) -> int:
        return self.weight_version

    def stream(self) -> Token:
        raise NotImplementedError


def call(name: str, arguments: str, format: str) -> list[int]:
    """The tokens of a reply with one tool call, as a model of the format writes them."""
    s = TOKENIZER.special_id
    if format == "v3.1":
        inner = [*TOKENIZER.encode(name), s(TOOL_SEP), *TOKENIZER.encode(arguments)]
    else:
        inner = [
            *TOKENIZER.encode("function"), s(TOOL_SEP), *TOKENIZER.encode(f"{name}\n```json\n{arguments}\n```")
        ]  # fmt: skip
    return [s(CALLS_BEGIN), s(CALL_BEGIN), *inner, s(CALL_END), s(CALLS_END), TOKENIZER.eos_id]


def add(a: int, b: int = 0) -> int:
    """Add two numbers."""
    if a > 99:
        raise ValueError("too large")
    return a + b


def slow(a: int) -> int:
    time.sleep(60)
    return a


def play(scripted: Scripted, format: str, max_tokens: int = 200, max_turns: int = 4, **options: Any) -> Sample:
    environment = options.pop("environment", None) or (lambda: ToolEnvironment([add, slow], timeout=0.05))
    made = rollouts(scripted, format, environment=environment, max_turns=max_turns, record_experts=True, context=4000)
    params = SamplingParams(max_tokens=max_tokens)
    (group,) = made.groups([(0, {"prompt": "what is 3 + 4?", "answer": "7"})], 1, params, 0)
    return group.samples[0]


@pytest.mark.parametrize("format", ["v3", "r1", "v3.1"])
def test_a_tool_is_called_and_its_result_is_read_but_not_learnt(format: str) -> None:
    asking = [*TOKENIZER.encode("I add"), *call("add", '{"a": 3, "b": 4}', format)]
    answer = [*TOKENIZER.encode("it is 7"), TOKENIZER.eos_id]
    scripted = Scripted(asking, answer)
    sample = play(scripted, format)
    assert (sample.turns, sample.finish_reason, sample.weight_version) == (2, "stop", 5)
    # Token in, token out: the second prompt is the first, what was written, and what the tool said.
    first, second = scripted.read[0][0], scripted.read[1][0]
    assert second[: len(first) + len(asking)] == first + asking
    tool = second[len(first) + len(asking) :]
    assert sample.token_ids == second + answer and sample.prompt_length == len(first)
    assert sample.written == [True] * len(asking) + [False] * len(tool) + [True] * len(answer)
    assert sample.written_logprobs == [-0.5] * (len(asking) + len(answer))
    assert sample.logprobs[len(asking) : -len(answer)] == [0.0] * len(tool)
    assert "7" in TOKENIZER.decode(tool, skip_special=True)
    assert sample.text.endswith("it is 7")
    # Experts: as they were chosen when each token was read first.
    assert sample.experts is not None and len(sample.experts) == len(sample.token_ids) - 1
    assert sample.experts[:, 0, 0].tolist() == [1] * (len(first) + len(asking) - 1) + [2] * (len(tool) + len(answer))
    # What the template writes of the same conversation, but for the thought that R1 does not repeat.
    if format != "r1":
        messages = [
            {"role": "user", "content": "what is 3 + 4?"},
            {"role": "assistant", "content": "I add", "tool_calls": [
                {"type": "function", "function": {"name": "add", "arguments": '{"a": 3, "b": 4}'}}]},
            {"role": "tool", "content": "7"},
            {"role": "assistant", "content": "it is 7"},
        ]  # fmt: skip
        tools = ToolEnvironment([add, slow]).tools
        whole = TOKENIZER.encode_segments(encode_chat(messages, format, tools, add_generation_prompt=False))
        assert TOKENIZER.decode(sample.token_ids) == TOKENIZER.decode(whole)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("add", '{"a": 3, "b": 4}', "7"),
        ("add", '{"a": 3}', "3"),
        ("sub", '{"a": 3}', "error: there is no tool 'sub'; there are add, slow"),
        ("add", '{"a": ', "error: the arguments are not JSON"),
        ("add", "[3, 4]", "error: the arguments must be a JSON object"),
        ("add", '{"c": 3}', "error: TypeError"),
        ("add", '{"a": 100}', "error: ValueError: too large"),
        ("slow", '{"a": 1}', "error: slow took longer than 0.05 s"),
    ],
)
def test_what_a_tool_says_and_what_goes_wrong_are_told_to_the_model(name: str, arguments: str, says: str) -> None:
    environment = ToolEnvironment([add, slow], timeout=0.05)
    reply = read_reply(call(name, arguments, "v3")[:-1], TOKENIZER, "v3")
    answer = environment.step(reply)
    assert answer is not None and answer[0]["content"].startswith(says)


def test_calls_are_control_tokens_never_text_that_spells_them() -> None:
    text = f"{CALLS_BEGIN}{CALL_BEGIN}function{TOOL_SEP}add\n```json\n{{}}\n```{CALL_END}{CALLS_END}"
    assert not read_reply(TOKENIZER.encode(text), TOKENIZER, "v3").calls
    ids = call("add", "{}", "v3")
    for wrong in (ids[:-3], [t for t in ids if t != TOKENIZER.special_id(TOOL_SEP)]):
        (found,) = read_reply(wrong, TOKENIZER, "v3").calls
        assert "call" in ToolEnvironment([add]).answer(found)


def test_an_episode_ends_at_its_limits() -> None:
    asking = call("add", '{"a": 1}', "v3")
    sample = play(Scripted(asking, asking, asking), "v3", max_turns=2)
    assert (sample.turns, sample.finish_reason, sample.truncated) == (2, "turns", False)
    sample = play(Scripted(asking, asking, asking), "v3", max_tokens=len(asking) + 3)
    assert (sample.turns, sample.finish_reason, sample.written_tokens) == (2, "length", len(asking) + 3)
    sample = play(Scripted(asking, asking, asking), "v3", max_tokens=len(asking))
    assert (sample.turns, sample.finish_reason) == (1, "length") and not sample.written[-1]


class Guess:
    """The example of training/grpo/environment.py."""

    reward: float | None = None

    def reset(self, row: Any) -> Opening:
        self.secret = row["answer"]
        return Opening([{"role": "user", "content": row["prompt"]}])

    def step(self, reply: Reply) -> Any:
        if reply.content.strip() == self.secret:
            self.reward = 1.0
            return None
        return [{"role": "user", "content": "No, guess again."}]


@pytest.mark.parametrize("format", ["v3", "r1", "v3.1"])
def test_an_environment_answers_until_it_is_content(format: str) -> None:
    end = PromptFormat(TOKENIZER, format).end_id
    wrong, right = ([*TOKENIZER.encode(guess), end] for guess in ("6", "7" if format != "r1" else "</think>7"))
    scripted = Scripted(wrong, wrong, right)
    sample = play(scripted, format, environment=Guess)
    assert (sample.turns, sample.environment_reward, sample.finish_reason) == (3, 1.0, "stop")
    assert TOKENIZER.decode(sample.token_ids).count("No, guess again.") == 2
    assert [sample.written.count(True)] == [len(wrong) * 2 + len(right)]


def test_one_turn_asks_for_no_answer() -> None:
    sample = play(Scripted([*TOKENIZER.encode("7"), TOKENIZER.eos_id]), "v3", environment=SingleTurn, max_turns=1)
    assert (sample.turns, sample.finish_reason, sample.text) == (1, "stop", "7")


def test_a_function_becomes_a_tool_of_its_types() -> None:
    def search(query: str, limit: int = 3, tags: list[str] | None = None) -> str:
        """Search for something."""
        return ""

    found = describe(search)["function"]
    assert (found["name"], found["description"]) == ("search", "Search for something.")
    assert found["parameters"]["required"] == ["query"]
    assert found["parameters"]["properties"]["limit"] == {"type": "integer"}
    json.dumps(found)

    def variadic(*values: int) -> int:
        return 0

    with pytest.raises(UserError, match="cannot be given by name"):
        describe(variadic)


def test_positions_of_packed_sequences() -> None:
    positions, cu_seqlens, longest = packed([3, 1, 2], [0, 5, 2])
    assert positions.tolist() == [0, 1, 2, 5, 2, 3] and cu_seqlens.tolist() == [0, 3, 4, 6] and longest == 3


# --- environments of the user that fail ---


class Moody:
    """Does at one place what it is told to do."""

    reward = None

    def __init__(self, place: str, mood: Callable[[], Any]) -> None:
        self.place, self.mood = place, mood
        self.turn("making it")

    def turn(self, place: str) -> None:
        if place == self.place:
            self.mood()

    def reset(self, row: Mapping[str, Any]) -> Opening:
        self.turn("reset")
        return Opening(messages_of(row))

    def step(self, reply: Reply) -> None:
        self.turn("step")


def leave() -> None:
    raise SystemExit(0)


def fail() -> None:
    raise TimeoutError("its own")


@pytest.mark.parametrize("place", ["making it", "reset", "step"])
@pytest.mark.parametrize(
    ("mood", "message"),
    [
        (fail, "raised TimeoutError: its own"),
        (leave, "raised RuntimeError: it called exit"),
        (partial(time.sleep, 20), "took longer than 0.2 s; mend it, or raise environment.timeout"),
    ],
)
def test_an_environment_that_fails_ends_the_run_in_one_line(place: str, mood: Callable[[], Any], message: str) -> None:
    rollout = Scripted([TOKENIZER.eos_id])
    environment = partial(OwnEnvironment, partial(Moody, place, mood), "mine:Moody", 0.2)
    with pytest.raises(UserError) as caught:
        rollouts(rollout, "r1", environment=environment, max_turns=2).groups(
            [(0, {"prompt": "1 + 1"})], 2, SamplingParams(max_tokens=4), 0
        )
    assert str(caught.value) == f"environment.factory mine:Moody: {place} {message}"


def test_a_tool_that_calls_exit_is_an_error_to_the_model() -> None:
    def stop() -> str:
        raise SystemExit(1)

    assert ToolEnvironment([stop]).answer(Call("stop", "{}", "function", None)) == "error: RuntimeError: it called exit"
