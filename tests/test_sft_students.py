"""Dense students through transformers: samples in the words of their own template, of which none sees another."""

import json
from pathlib import Path
from typing import Any

import finetuning as tiny
import numpy as np
import pytest
import torch
from dense_student import OPENING, tokenizer_of, tokenizers, transformers, write_student
from safetensors.torch import load_file, save_file

from dsv3 import backends
from dsv3.errors import UserError
from dsv3.parallel.data import DataParallel
from dsv3.training.chat_data import ChatRow
from dsv3.training.progress import Progress
from dsv3.training.sft.config import SftConfig
from dsv3.training.sft.run import Sft
from dsv3.training.sft.templates import Template


def config_of(folder: Path, student: Path, run_dir: Path, *overrides: str) -> SftConfig:
    return tiny.config_of(folder, run_dir, f"model={student}", *overrides)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students")
    tiny.write_rows(folder / "chats.jsonl", [tiny.conversation(number) for number in range(40)])
    return folder


def opened(config: SftConfig) -> Sft:
    with backends.use_backend("cpu"):
        return Sft(config, DataParallel(), Progress(False))


# --- what is computed ---


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("qwen2", {"tie_word_embeddings": True}), ("qwen3", {"head_dim": 8}), ("llama", {"attention_bias": True})],
)
def test_the_loss_is_that_of_transformers_for_every_sample_alone(
    data: Path, tmp_path: Path, kind: str, fields: dict[str, Any]
) -> None:
    student = write_student(tmp_path / "student", kind, **fields)
    run = opened(config_of(data, student, tmp_path / "run"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(student, attn_implementation="eager").eval()
    total, learnt = 0.0, 0
    for sample in np.concatenate(run.plan.step(0)):
        ids, mask = (torch.from_numpy(values) for values in run.samples[int(sample)])
        with torch.no_grad():
            logp = theirs(ids[None]).logits[0, :-1].log_softmax(-1)
        total -= logp[torch.arange(len(ids) - 1), ids[1:]][mask[1:]].double().sum().item()
        learnt += int(mask[1:].sum())
    run.update = lambda *args: {}  # type: ignore[method-assign]
    with backends.use_backend("cpu"):
        assert run.optimize(0)["loss"] == pytest.approx(total / learnt, rel=1e-4)


def test_passes_of_any_size_make_the_same_gradient_and_recomputing_changes_nothing(data: Path, tmp_path: Path) -> None:
    student, found = write_student(tmp_path / "student"), []
    for number, options in enumerate((["batch.micro_tokens=100000"], ["batch.micro_tokens=1"], ["recompute=full"])):
        run = opened(config_of(data, student, tmp_path / str(number), *options))
        run.update = lambda *args: {}  # type: ignore[method-assign]
        with backends.use_backend("cpu"):
            run.optimize(0)
        found.append(torch.cat([view.reshape(-1) for view in run.gradients.views]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found[2], found[0], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_run_learns_resumes_to_the_bit_and_leaves_what_transformers_generates_with(
    data: Path, tmp_path: Path
) -> None:
    student = write_student(tmp_path / "student", tie_word_embeddings=True)
    options = ("optim.lr=1e-2", "optim.schedule=[]", "batch.samples=16")
    log = tiny.run(config_of(data, student, tmp_path / "whole", "steps=40", *options))
    assert log[-1]["loss"] < 0.3 * log[0]["loss"] and "expert_load" in log[0]
    tiny.run(config_of(data, student, tmp_path / "parts", "steps=10", *options))
    tiny.run(config_of(data, student, tmp_path / "parts", "steps=40", *options))
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "whole" / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say 7 0"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = prompt if isinstance(prompt, torch.Tensor) else prompt["input_ids"]
    reply = model.generate(ids, max_new_tokens=60, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert tokenizer.decode(reply).startswith("cat ")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in reply, "it ends its turn, and generation stops there"


# --- templates ---


def encoded(template: Template, messages: list[dict[str, Any]], thinking: bool = True) -> list[tuple[str, list[str]]]:
    """Of each sample: its text, and the runs of it that are learnt."""
    found = []
    for ids, mask in template.encode(ChatRow(messages), thinking):
        runs, before = list[list[int]](), False
        for token, wanted in zip(ids, mask, strict=True):
            if wanted and not before:
                runs.append([])
            if wanted:
                runs[-1].append(token)
            before = wanted
        found.append((template.tokenizer.decode(ids), [template.tokenizer.decode(run) for run in runs]))
    return found


ASK, AGAIN = {"role": "user", "content": "2+2?"}, {"role": "user", "content": "3+3?"}
THOUGHT = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}
PLAIN = {"role": "assistant", "content": "6"}


def test_replies_are_learnt_with_thought_and_end_behind_the_templates_own_prompt() -> None:
    template = Template(tokenizer_of(), "student")
    ((text, learnt),) = encoded(template, [ASK, THOUGHT, AGAIN, PLAIN])
    assert learnt == ["<think>\ntwo and two\n</think>\n\n4<|im_end|>", "6<|im_end|>"]
    assert text.startswith("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>")
    ((_, learnt),) = encoded(template, [ASK, THOUGHT], thinking=False)
    assert learnt == ["\n\n4<|im_end|>"], "the thought is shown, not learnt"


def test_a_template_that_opens_thoughts_and_forgets_earlier_ones_makes_a_sample_of_each_reply() -> None:
    template = Template(tokenizer_of(OPENING), "student")
    first, second = encoded(template, [ASK, THOUGHT, AGAIN, PLAIN])
    assert first[1] == ["two and two\n</think>\n\n4<|im_end|>"], "what the prompt opened is not written again"
    assert second[0].count("two and two") == 0 and second[1] == ["\n</think>\n\n6<|im_end|>"]


def test_a_tokenizer_that_cannot_hold_the_tags_is_refused_where_there_are_thoughts() -> None:
    lossy = Template(tokenizer_of(normalizer=tokenizers.normalizers.Replace("<think>", "")), "student")
    assert encoded(lossy, [AGAIN, PLAIN])
    with pytest.raises(UserError, match=r"row: message 1 has a thought, but the tokenizer of student does not keep"):
        encoded(lossy, [ASK, THOUGHT])


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("", "has no chat template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "ends a reply .* with no control token"),
        ("{{ raise_exception('no') }}", "refuses this conversation"),
    ],
)
def test_templates_that_cannot_be_learnt_from_are_refused(template: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Template(tokenizer_of(template), "student")


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["lora.rank=2"], "lora.rank is for models of the DeepSeek-V3 family"),
        (["mtp_weight=0.1"], "mtp_weight is for models of the DeepSeek-V3 family"),
        (["data.format=r1"], "has a template of its own"),
        (["data.seq_len=512"], "data.seq_len is 512, the model's context 256"),
    ],
)
def test_settings_of_the_family_are_refused(data: Path, tmp_path: Path, options: list[str], complaint: str) -> None:
    student = write_student(tmp_path / "student")
    with pytest.raises(UserError) as error:
        opened(config_of(data, student, tmp_path / "run", *options))
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_other_families_and_sliding_attention_are_refused(data: Path, tmp_path: Path) -> None:
    other = write_student(tmp_path / "other")
    shape = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(shape | {"model_type": "gemma"}))
    with pytest.raises(UserError, match="is a 'gemma'; students are of llama, qwen2, qwen3"):
        opened(config_of(data, other, tmp_path / "run"))
    layers = ["full_attention", "sliding_attention"]
    sliding = write_student(tmp_path / "sliding", use_sliding_window=True, layer_types=layers)
    with pytest.raises(UserError, match="has layers of sliding attention"):
        opened(config_of(data, sliding, tmp_path / "run"))


def test_a_directory_that_is_damaged_is_said_in_one_line(data: Path, tmp_path: Path) -> None:
    student = write_student(tmp_path / "student")
    whole = {name: tensor.clone() for name, tensor in load_file(student / "model.safetensors").items()}
    (student / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"student: cannot be read \("):
        opened(config_of(data, student, tmp_path / "run"))
    part = {name: tensor for name, tensor in whole.items() if "layers.1.mlp" not in name}
    save_file(part, student / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight is not in its weights \(3 tensors"):
        opened(config_of(data, student, tmp_path / "run"))
