"""lm-eval's tasks on our models: the numbers are those of lm-eval's own model class on the same weights."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch

from dsv3.core.completer import Reply
from dsv3.errors import UserError
from dsv3.evaluation.harness import run_harness
from dsv3.evaluation.published import reference
from dsv3.evaluation.subject import ChatSubject, LocalSubject

CONFIG = tiny_model.CONFIG.replace(max_position_embeddings=512)
BOTH = ["own_mmlu_sums", "own_gsm8k"]
needs_peer = pytest.mark.peer

QUESTIONS = [
    {
        "question": f"What is {a} + {b}?",
        "choices": [str(a + b + (place - (a + b)) % 4) for place in range(4)],
        "answer": (a + b) % 4,
    }
    for a in range(4)
    for b in range(3)
]
WORDED = [
    {"question": f"Ann has {n} cats and gets one more. How many?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"}
    for n in range(1, 9)
]
MMLU = """
task: {name}
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files: {{test: {folder}/mmlu.jsonl, dev: {folder}/mmlu.jsonl}}
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
num_fewshot: 2
output_type: multiple_choice
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nC. {{{{choices[2]}}}}\\n\
D. {{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
GROUP = """
group: own_mmlu
task: [own_mmlu_sums, own_mmlu_more]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
"""
GSM8K = """
task: own_gsm8k
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files: {{test: {folder}/gsm8k.jsonl, train: {folder}/gsm8k.jsonl}}
training_split: train
fewshot_split: train
test_split: test
num_fewshot: 3
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["Question:"]
  do_sample: false
  temperature: 0.0
  max_gen_toks: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    regexes_to_ignore: [",", "(?s).*#### "]
filter_list:
  - name: strict-match
    filter:
      - {{function: regex, regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"}}
      - {{function: take_first}}
metadata: {{version: 3.0}}
"""
BYTES = """
task: own_text
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files: {{test: {folder}/gsm8k.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def peer() -> Any:
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks in the shape of MMLU and GSM8K, and their data."""
    place = tmp_path_factory.mktemp("own")
    for name, rows in (("mmlu", QUESTIONS), ("gsm8k", WORDED)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("own_mmlu_sums", "own_mmlu_more"):
        (place / f"{name}.yaml").write_text(MMLU.format(name=name, folder=place))
    (place / "own_mmlu.yaml").write_text(GROUP)
    (place / "own_gsm8k.yaml").write_text(GSM8K.format(folder=place))
    (place / "own_text.yaml").write_text(BYTES.format(folder=place))
    return place


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("saved") / "model", "v3", config=CONFIG)


def load(saved: Path) -> LocalSubject:
    return LocalSubject(tiny_model.load(saved), tiny_model.TOKENIZER, "tiny", "d" * 16)


@pytest.fixture
def subject(saved: Path) -> LocalSubject:
    return load(saved)


@pytest.fixture(scope="module")
def theirs(peer: Any, saved: Path) -> Any:
    """lm-eval's own class with transformers' implementation on the same weights."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(saved, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    # Every document begins with this token; their class leaves that to the tokenizer.
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=4,
        add_bos_token=True,
        max_length=CONFIG.max_position_embeddings,
    )


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, place) for place, each in enumerate(arguments)]


def model_of(subject: LocalSubject) -> Any:
    from dsv3.evaluation.harness import Silent
    from dsv3.evaluation.harness_model import model_class

    return model_class()(subject, False, False, None, 0, Silent())


@needs_peer
def test_likelihoods_are_those_of_lm_evals_own_class(subject: LocalSubject, theirs: Any):
    long = " ".join(f"{n} + 1 = {n + 1}, a cat is a cat." for n in range(150))
    pairs = [
        ("the cat sat on the", " mat"),
        ("the cat sat on the", " dog"),
        ("the cat sat on the ", "mat"),  # a space at the end goes to the continuation
        ("", "1 + 1 = 2"),
        ("Question: 深度\nAnswer:", " 求索 😀"),
        ("a", "b" * 40),
        (long, " the end"),  # longer than the context
        ("the cat sat on the", " mat"),  # the same again
    ]
    ours_model = model_of(subject)
    with ours_model.keeping("pairs", None):
        ours = ours_model.loglikelihood(instances("loglikelihood", pairs))
    expected = theirs.loglikelihood(instances("loglikelihood", pairs))
    for (mine, greedy), (wanted, best), pair in zip(ours, expected, pairs, strict=True):
        assert mine == pytest.approx(wanted, abs=1e-4), pair
        assert greedy == best
    assert ours_model.account.shortened == 1


@needs_peer
def test_rolling_likelihoods_are_the_sum_over_all_tokens(subject: LocalSubject, theirs: Any):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    texts = ["a cat is a cat", " ".join(f"{n} sat on {n + 1}" for n in range(200))]
    ours_model = model_of(subject)
    with ours_model.keeping("texts", None):
        ours = ours_model.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]))
    for mine, text in zip(ours, texts, strict=True):
        # Their class also scores the token that begins a document, as if it were text; we do not.
        ids = theirs.tok_encode(text, add_special_tokens=False)
        cuts = get_rolling_token_windows(ids, theirs.prefix_token_id, CONFIG.max_position_embeddings, 1)
        scores = theirs._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in cuts])
        assert mine == pytest.approx(sum(score for score, _ in scores), abs=1e-3)


@needs_peer
def test_a_group_in_the_shape_of_mmlu(subject: LocalSubject, theirs: Any, peer: Any, folder: Path, tmp_path: Path):
    (result,) = run_harness(subject, ["lm:own_mmlu"], include_path=folder, out=tmp_path)
    expected = peer.simple_evaluate(
        model=theirs,
        tasks=["own_mmlu"],
        task_manager=peer.tasks.TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    assert result.value == pytest.approx(expected["results"]["own_mmlu"]["acc,none"])
    assert (result.items, result.of, result.shots, result.samples) == (24, 24, 2, 1)
    assert result.low < result.value < result.high
    assert result.metric == "accuracy by likelihood" and result.protocol == "lm-eval" and result.scale == 100
    assert set(result.groups) == {"own_mmlu_sums", "own_mmlu_more"}
    assert result.seconds > 0 and result.tokens > 0
    assert reference(result) is None
    assert len((tmp_path / "graded" / "lm.own_mmlu.jsonl").read_text().splitlines()) == 24


@needs_peer
def test_replies_in_the_shape_of_gsm8k(subject: LocalSubject, theirs: Any, peer: Any, folder: Path):
    (result,) = run_harness(subject, ["own_gsm8k"], include_path=folder, limit=5)
    expected = peer.simple_evaluate(
        model=theirs,
        tasks=["own_gsm8k"],
        task_manager=peer.tasks.TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        limit=5,
    )
    assert result.value == expected["results"]["own_gsm8k"]["exact_match,strict-match"]
    assert (result.items, result.of, result.shots, result.metric) == (5, 8, 3, "accuracy")
    assert len(result.lengths) == 5 and max(result.lengths) <= 8
    assert result.truncated is not None and 0 <= result.truncated <= 1


@needs_peer
def test_greedy_replies_are_those_of_lm_evals_own_class(subject: LocalSubject, theirs: Any):
    asked = [(text, {"until": ["\n"], "max_gen_toks": 12}) for text in ("the cat sat", "1 + 1 =", "深度")]
    ours_model = model_of(subject)
    with ours_model.keeping("replies", None):
        ours = ours_model.generate_until(instances("generate_until", asked))
    assert ours == theirs.generate_until(instances("generate_until", asked))


@needs_peer
def test_bits_per_byte_have_an_interval_and_are_better_when_lower(subject: LocalSubject, peer: Any, folder: Path):
    (result,) = run_harness(subject, ["own_text"], include_path=folder)
    assert result.metric == "bits per byte" and result.lower and result.scale == 1
    assert result.low < result.value < result.high


@needs_peer
def test_the_same_command_computes_nothing_twice(subject: LocalSubject, peer: Any, folder: Path, tmp_path: Path):
    first = run_harness(subject, BOTH, include_path=folder, out=tmp_path)
    computed = subject.likelihood.computed

    def generate(*_: Any) -> None:
        raise AssertionError("a reply that is kept was asked for again")

    subject.continue_texts = lambda texts, params, keep: [generate() for _ in texts]
    again = run_harness(subject, BOTH, include_path=folder, out=tmp_path)
    assert subject.likelihood.computed == computed
    assert [each.as_json() for each in again] == [each.as_json() for each in first]
    assert first[0].seconds > 0
    # Another model's answers are not this one's.
    subject.digest = "e" * 16
    run_harness(subject, BOTH[:1], include_path=folder, out=tmp_path)
    assert subject.likelihood.computed > computed


@needs_peer
def test_shots_and_long_prompts(subject: LocalSubject, peer: Any, folder: Path):
    (result,) = run_harness(subject, ["own_gsm8k"], include_path=folder, shots=0)
    assert result.shots == 0
    subject.context = 48
    (short,) = run_harness(subject, ["own_gsm8k"], include_path=folder)
    assert any("cut at their beginning" in flag for flag in short.flags)


class Parrot:
    """Answers with the number after the one in the question; keeps the conversations."""

    name = "parrot"

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def complete(self, conversations, params, on_reply=None):
        replies = []
        for index, conversation in enumerate(conversations):
            self.heard.append(conversation)
            count = int(conversation[-1]["content"].split("Ann has ")[1].split()[0])
            text = f"{count} + 1 = {count + 1}\n#### {count + 1} Question: another"
            replies.append(Reply(text, "", text, "stop", 9))
            if on_reply is not None:
                on_reply(index, replies[-1])
        return replies


@needs_peer
def test_a_server_is_asked_in_conversations(peer: Any, folder: Path):
    parrot = Parrot()
    (result,) = run_harness(ChatSubject(parrot, "server"), ["own_gsm8k"], include_path=folder)
    assert result.value == 1 and result.protocol == "lm-eval, chat"
    roles = [message["role"] for message in parrot.heard[0]]
    assert roles == ["user", "assistant"] * 3 + ["user"]
    with pytest.raises(UserError, match="compares likelihoods") as caught:
        run_harness(ChatSubject(parrot, "server"), ["own_mmlu"], include_path=folder)
    assert "\n" not in str(caught.value)


@needs_peer
def test_what_cannot_be_loaded_is_said_in_a_line(subject: LocalSubject, peer: Any, tmp_path: Path, monkeypatch: Any):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "away.yaml").write_text(GSM8K.format(folder=tmp_path).replace("own_gsm8k", "away"))
    hub = GSM8K.format(folder=tmp_path).replace("own_gsm8k", "hub").replace("path: json", "path: nobody/nothing")
    (tmp_path / "hub.yaml").write_text("\n".join(line for line in hub.splitlines() if "data_files" not in line))
    for name in ("away", "hub"):
        with pytest.raises(UserError, match=rf"lm:{name}: .*cannot be loaded here.*data_files") as caught:
            run_harness(subject, [name], include_path=tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such folder"):
        run_harness(subject, ["away"], include_path=tmp_path / "gone")


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"lm:gsm8k needs the package lm_eval: pip install 'dsv3\[eval\]'"):
        run_harness(ChatSubject(Parrot(), "server"), ["gsm8k"])


def share(rank: int, place: Path, saved: Path, folder: Path) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    found = run_harness(load(saved), BOTH, include_path=folder, out=place, limit=7)
    values = [[result.value, result.items, result.tokens, len(result.lengths)] for result in found]
    (place / f"{rank}.json").write_text(json.dumps(values))
    torch.distributed.destroy_process_group()


@needs_peer
@pytest.mark.slow
def test_two_processes_share_the_requests(subject: LocalSubject, peer: Any, saved: Path, folder: Path, tmp_path: Path):
    alone = run_harness(subject, BOTH, include_path=folder, limit=7)
    command = [sys.executable, __file__]
    both = [subprocess.Popen([*command, str(rank), str(tmp_path), str(saved), str(folder)]) for rank in (0, 1)]
    assert [process.wait() for process in both] == [0, 0]
    assert json.loads((tmp_path / "1.json").read_text()) == []
    together = json.loads((tmp_path / "0.json").read_text())
    for one, (value, items, tokens, lengths) in zip(alone, together, strict=True):
        # The shorter share is filled up, so that both processes ask equally often.
        assert (value, items) == (one.value, 7)
        assert one.tokens <= tokens <= one.tokens * 8 / 7 + 8
        assert len(one.lengths) <= lengths <= len(one.lengths) + 1


if __name__ == "__main__":
    share(int(sys.argv[1]), *map(Path, sys.argv[2:]))
