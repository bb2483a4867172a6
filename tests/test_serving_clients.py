"""Clients that others wrote against a server with a real engine, in processes of their own, without a network."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny_model
from serving_server import Served, save_model, serve
from tiny_model import TOKENIZER

from dsv3.core.special_tokens import END_THINK
from dsv3.evaluation.harness import run_harness
from dsv3.evaluation.likelihood import Likelihood, Request
from dsv3.evaluation.subject import LocalSubject

pytestmark = pytest.mark.peer

QUESTIONS = [
    {"question": f"{a} + {b} =", "choices": [str(a + b + step) for step in (0, 1, 2)], "answer": 0}
    for a in range(1, 4)
    for b in range(1, 4)
]
CHOICES = """
task: own_choices
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files: {{test: {folder}/own.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata: {{version: 1.0}}
"""
REPLIES = """
task: own_replies
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files: {{test: {folder}/own.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["Question:"], do_sample: false, temperature: 0.0, max_gen_toks: 6}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata: {{version: 1.0}}
"""
PAIRS = [
    ("the cat sat on the", " mat"),
    ("the cat sat on the", " dog and a cat"),
    ("Question: 深度\nAnswer:", " 求索 😀"),
    ("a" * 200, "b" * 40),
    ("the cat sat on the", " mat"),
]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "sign": {"enum": ["+", "-"]}},
            "required": ["a", "sign"],
            "additionalProperties": False,
        },
    },
}
HELLO: Any = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("served") / "tiny", "v3.1")


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Served]:
    with serve(model, "--cache-gib", "0.02") as served:
        yield served


@pytest.fixture
def server(running: Served) -> Iterator[Served]:
    yield running
    running.settle()


# lm-eval -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def tokenizer(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's, with the begin token in front of every document, which lm-eval leaves to the tokenizer."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(model)
    begin = (loaded.bos_token, loaded.bos_token_id)
    loaded.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    folder = tmp_path_factory.mktemp("tokenizer")
    loaded.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "own_choices.yaml").write_text(CHOICES.format(folder=folder))
    (folder / "own_replies.yaml").write_text(REPLIES.format(folder=folder))
    return folder


def completions(server: Served, tokenizer: Path, **options: Any) -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="tiny", tokenizer_backend="huggingface",
        tokenizer=str(tokenizer), add_bos_token=True, max_retries=1, max_length=2000, **options,
    )  # fmt: skip


def as_request(context: str, more: str) -> Request:
    """The tokens of both together, cut where those of the context end: lm-eval's way."""
    ids, cut = TOKENIZER.encode(context + more), len(TOKENIZER.encode(context))
    return Request((TOKENIZER.bos_id, *ids[:cut]), tuple(ids[cut:]))


def subject(model: Path) -> LocalSubject:
    return LocalSubject(tiny_model.load(model), TOKENIZER, "tiny", "d" * 16)


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"num_concurrent": 3}])
def test_lm_evals_likelihoods_are_our_own(server: Served, model: Path, lm_eval: Any, tokenizer: Path, options: Any):
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(PAIRS)]
    got = completions(server, tokenizer, **options).loglikelihood(asked)
    requests = [as_request(*pair) for pair in PAIRS]
    ours = Likelihood(tiny_model.load(model).model).score(requests)
    for (logprob, greedy), score in zip(got, ours, strict=True):
        assert logprob == pytest.approx(score.logprob, abs=1e-3) and greedy == score.greedy


def test_the_log_probabilities_of_a_text_are_our_own(server: Served, model: Path):
    """As lm-eval asks, with text for the prompt: the server begins it with the begin token."""
    context, more = PAIRS[2]
    body = {"prompt": context + more, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    table = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode(context + more)]
    assert len(table["token_logprobs"]) == len(ids) + 1 and table["token_logprobs"][0] is None
    (ours,) = Likelihood(tiny_model.load(model).model).score([Request(tuple(ids[:1]), tuple(ids[1:]))])
    assert sum(table["token_logprobs"][1:-1]) == pytest.approx(ours.logprob, abs=1e-3)


def test_a_task_of_lm_eval_gives_what_our_own_evaluation_gives(
    server: Served, model: Path, lm_eval: Any, tokenizer: Path, tasks: Path
):
    found = lm_eval.simple_evaluate(
        model=completions(server, tokenizer, batch_size=4),
        tasks=["own_choices", "own_replies"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    ours = run_harness(subject(model), ["own_choices", "own_replies"], include_path=tasks, out=tasks / "ours")
    assert found["results"]["own_choices"]["acc,none"] == ours[0].value
    assert found["results"]["own_replies"]["exact_match,none"] == ours[1].value
    theirs = {sample["doc_id"]: sample["resps"][0][0] for sample in found["samples"]["own_replies"]}
    assert len(theirs) == len(QUESTIONS) and len(set(theirs.values())) > 1


def test_lm_eval_chats(server: Served, lm_eval: Any, tasks: Path):
    """Its chat class; the replies are those that the server gives to anybody."""
    from lm_eval.models.openai_completions import LocalChatCompletion

    found = lm_eval.simple_evaluate(
        model=LocalChatCompletion(base_url=f"{server.url}/v1/chat/completions", model="tiny", max_retries=1),
        tasks=["own_replies"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
        log_samples=True,
    )
    for sample in found["samples"]["own_replies"]:
        messages = [{"role": "user", "content": sample["doc"]["question"]}]
        body = {"messages": messages, "max_tokens": 6, "temperature": 0, "stop": ["Question:"]}
        reply = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
        assert sample["resps"][0][0] == reply


# openai --------------------------------------------------------------------------------------------------------------


def client(server: Served) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60)


def test_openai_streams_what_it_gets_whole(server: Served):
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "seed": 5, "max_tokens": 40, "logprobs": True}
    whole = client(server).chat.completions.create(**asked)
    options = {"include_usage": True}
    chunks = list(client(server).chat.completions.create(**asked, stream=True, stream_options=options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == len(whole.choices[0].logprobs.content)
    assert whole.choices[0].model_extra["seed"] == 5


@pytest.mark.parametrize("seed", range(3))
def test_openai_parses_what_a_schema_guided(server: Served, seed: int):
    pydantic = pytest.importorskip("pydantic")
    number = (int, pydantic.Field(ge=0, le=99))
    kind = pydantic.create_model("Answer", number=number, unit=(Literal["cat", "mat"], ...), sure=(bool, ...))
    parsed = client(server).chat.completions.parse(
        model="tiny", messages=HELLO, response_format=kind, seed=seed, max_tokens=400
    )
    answer = parsed.choices[0].message.parsed
    assert 0 <= answer.number <= 99 and answer.unit in ("cat", "mat") and parsed.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_openai_gets_a_call_that_fits_when_one_is_required(server: Served, stream: bool):
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [ADD], "tool_choice": "required", "seed": 2}
    asked |= {"max_tokens": 400, "parallel_tool_calls": False}
    if stream:
        with client(server).chat.completions.stream(**asked) as events:
            choice = events.get_final_completion().choices[0]
    else:
        choice = client(server).chat.completions.create(**asked).choices[0]
    call = choice.message.tool_calls[0].function
    arguments = json.loads(call.arguments)
    assert choice.finish_reason == "tool_calls" and call.name == "add"
    assert set(arguments) == {"a", "sign"} and 0 <= arguments["a"] <= 99 and arguments["sign"] in "+-"


def test_openai_gets_reasoning_apart_from_the_answer(tmp_path: Path):
    with serve(save_model(tmp_path / "r1", "r1"), "--cache-gib", "0.01") as served:
        asked: dict[str, Any] = {"model": "r1", "messages": HELLO, "seed": 1, "max_tokens": 30}
        thought = client(served).chat.completions.create(**asked, extra_body={"ignore_eos": True})
        assert thought.choices[0].finish_reason == "length" and thought.choices[0].message.content is None
        assert thought.choices[0].message.model_extra["reasoning_content"]
        assert thought.usage.completion_tokens_details.reasoning_tokens == 30
        end = str(TOKENIZER.special_id(END_THINK))
        schema = {"name": "answer", "schema": {"enum": ["four", "five"]}}
        both = client(served).chat.completions.create(
            **asked, logit_bias={end: 100}, response_format={"type": "json_schema", "json_schema": schema}
        )
        assert json.loads(both.choices[0].message.content) in ("four", "five")
        assert both.choices[0].finish_reason == "stop"
        served.settle()
