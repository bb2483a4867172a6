"""Adapters beside a frozen model: they start as nothing, train in every format, decode as they train, and merge."""

import json
from pathlib import Path

import finetuning as tiny
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import configs, random_model, relative
from safetensors.torch import load_file, save_file
from tiny_model import TOKENIZER

from dsv3 import backends
from dsv3.core.checkpoint import save_pretrained
from dsv3.core.config import ModelConfig
from dsv3.core.generate import SamplingParams, SimpleRollout
from dsv3.core.model import DeepseekV3
from dsv3.core.step import Routing
from dsv3.errors import UserError
from dsv3.training.lora import LoraLinear, LoraSection, adapters, attach, load_adapter, save_adapter

pytestmark = pytest.mark.slow  # whole runs, with their checkpoints and logs

EVERYTHING = LoraSection(rank=4, targets=("*",))
# Projections of whole blocks, so that all of them stay FP8; of 8 routed experts, 2 a token, and a shared one.
BLOCKS = ModelConfig.from_pretrained("dsv3-2m").replace(
    vocab_size=400, hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=2,
    q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32,
    num_attention_heads=4, num_nextn_predict_layers=1, max_position_embeddings=256,
)  # fmt: skip
TOKENS = torch.arange(24)[None] * 7 % 400


@pytest.fixture(autouse=True)
def cpu() -> object:
    with backends.use_backend("cpu"):
        yield


def disturbed(model: DeepseekV3, settings: LoraSection = EVERYTHING, std: float = 0.2) -> DeepseekV3:
    """With adapters that are away from their start."""
    attach(model, settings, torch.float32, seed=0)
    with torch.no_grad():
        for number, (_, module) in enumerate(adapters(model)):
            torch.manual_seed(number)
            module.lora_B.normal_(0, std)
    return model


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    with backends.use_backend("cpu"):
        model = DeepseekV3(BLOCKS)
        model.init_weights(0.05, 1.0)  # of the scale of trained ones: larger ones blow the rounding of FP8 up
        save_pretrained(model, BLOCKS, folder, fp8=True, also=lambda place: TOKENIZER.save(place, "v3"))
    return folder


def opened(folder: Path, fp8: str = "keep") -> DeepseekV3:
    return DeepseekV3.from_pretrained(folder, dtype=torch.float32, fp8=fp8)


def logits(model: DeepseekV3, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens % model.config.vocab_size).logits


# --- what is adapted ---


def test_new_adapters_change_nothing_and_alone_train() -> None:
    model = random_model(tiny.SMALL, 0)
    before = logits(model)
    names = attach(model, EVERYTHING, torch.float32, seed=0)
    assert torch.equal(logits(model), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.{side}" for name in names for side in ("lora_A", "lora_B")}
    assert model.model.layers["0"].self_attn.o_proj.lora_A.abs().max() > 0


def test_patterns_name_projections_by_the_end_of_their_names() -> None:
    def chosen(*targets: str) -> set[str]:
        model = random_model(tiny.SMALL, 0)
        names = attach(model, LoraSection(rank=2, targets=targets), torch.float32, 0)
        return {name.removeprefix("model.layers.") for name in names}

    attention = {f"{i}.self_attn.{p}_proj" for i in (0, 1) for p in ("q_a", "q_b", "kv_b", "o")}
    attention |= {f"{i}.self_attn.kv_a_proj_with_mqa" for i in (0, 1)}
    shared = {"1.mlp.shared_experts.gate_up_proj", "1.mlp.shared_experts.down_proj"}
    assert chosen(*LoraSection().targets) == attention | shared, "neither routed experts nor MTP modules"
    assert chosen("o_proj") == {"0.self_attn.o_proj", "1.self_attn.o_proj"}
    assert chosen("layers.1.self_attn.q_?_proj") == {"1.self_attn.q_a_proj", "1.self_attn.q_b_proj"}
    assert chosen("gate_proj", "up_proj") == {"0.mlp.gate_up_proj", "1.mlp.shared_experts.gate_up_proj"}
    with pytest.raises(UserError, match=r"'mlp\.experts\.\*' names no projection .* there are mlp\.down_proj"):
        chosen("mlp.experts.*")
    with pytest.raises(UserError, match=r"is one matrix with .*gate_proj and .*up_proj; name both or neither"):
        chosen("o_proj", "up_proj")


def test_the_start_follows_from_the_seed_and_the_name() -> None:
    def start(targets: str, seed: int) -> torch.Tensor:
        model = random_model(tiny.SMALL, 0)
        attach(model, LoraSection(rank=2, targets=(targets,)), torch.float32, seed)
        return model.model.layers["1"].self_attn.o_proj.lora_A

    assert torch.equal(start("o_proj", 0), start("*", 0))
    assert not torch.equal(start("o_proj", 0), start("o_proj", 1))


# --- what it computes ---


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configs(mtp=1) | configs(gate="v2"), st.integers(1, 5))
def test_a_merged_model_is_the_adapted_one(tmp_path: Path, config: ModelConfig, rank: int) -> None:
    model = disturbed(random_model(config, 0), LoraSection(rank=rank, targets=("*",)))
    save_pretrained(model, config, tmp_path / "merged")
    merged = DeepseekV3.from_pretrained(tmp_path / "merged")
    tokens = torch.arange(20).view(2, 10)
    assert relative(logits(merged, tokens), logits(model, tokens)) < 1e-4
    assert relative(logits(random_model(config, 0), tokens), logits(model, tokens)) > 1e-3


def test_decoding_by_latents_sees_the_adapters_and_their_updates() -> None:
    """kv_b_proj is folded into queries and outputs there, so what was folded must follow the adapters."""
    model = disturbed(random_model(tiny.SMALL, 0))
    rollout = SimpleRollout(model)
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)

    def difference() -> float:
        """Of the log-probabilities while generating and in a training forward."""
        completion = rollout.generate([[1, 2, 3]], params)[0]
        tokens = torch.tensor([[1, 2, 3, *completion.token_ids]])
        logp = logits(model, tokens)[0].log_softmax(-1)
        again = logp[2:-1].gather(1, tokens[0, 3:, None])[:, 0]
        return (again - torch.tensor(completion.logprobs)).abs().max().item()

    assert difference() < 1e-4
    with torch.no_grad():
        for _, module in adapters(model):
            module.lora_B.mul_(-1.5)
    assert difference() < 1e-4, "a counted write is noticed"
    for _, module in adapters(model):
        module.lora_B.data.mul_(0.5)
    rollout.weights_changed()
    assert difference() < 1e-4, "any write is, once it is said"


def test_packing_the_base_leaves_the_adapters_in_force() -> None:
    model = disturbed(random_model(tiny.SMALL, 0))
    before = logits(model)
    model.pack()
    assert relative(logits(model), before) < 1e-5
    loss = model(TOKENS).logits.square().mean()
    loss.backward()
    assert all(module.lora_A.grad.abs().max() > 0 for name, module in adapters(model) if "layers.2" not in name)


def test_gradients_are_those_of_the_sum() -> None:
    """d(A) = s B^T dW and d(B) = s dW A^T, where dW is the gradient of the merged weight."""
    model, whole = disturbed(random_model(tiny.SMALL, 0)), random_model(tiny.SMALL, 0)
    with torch.no_grad():
        for name, module in adapters(model):
            whole.get_submodule(name).weight.copy_(module.merged())
    for each in (model, whole):
        each(TOKENS).logits.square().mean().backward()
    for name, module in adapters(model):
        of_weight = whole.get_submodule(name).weight.grad.chunk(module.parts)
        halves = zip(of_weight, module.lora_A.chunk(module.parts), module.lora_B.chunk(module.parts), strict=True)
        expected = [(module.scale * b.T @ dw, module.scale * dw @ a.T) for dw, a, b in halves]
        assert relative(module.lora_A.grad, torch.cat([a for a, _ in expected])) < 1e-3, name
        assert relative(module.lora_B.grad, torch.cat([b for _, b in expected])) < 1e-3, name


# --- FP8 ---


def test_an_fp8_base_stays_fp8_and_passes_gradients_on(fp8: Path) -> None:
    """Up to the rounding of activations and gradients to FP8. Experts are those of one pass: rounding may change a
    choice, and with it everything."""
    kept, wide = disturbed(opened(fp8), std=0.02), disturbed(opened(fp8, "dequantize"), std=0.02)
    chosen = Routing()
    wide(TOKENS, routing=chosen).logits.square().mean().backward()
    kept(TOKENS, routing=Routing(replay=chosen.experts)).logits.square().mean().backward()
    layer = kept.model.layers["1"]
    assert layer.self_attn.kv_b_proj.weight.dtype == layer.mlp.experts.down_proj.weight.dtype == torch.float8_e4m3fn
    near, far = dict(adapters(kept)), dict(adapters(wide))
    for name in near:
        if "layers.2" not in name:
            assert relative(near[name].lora_A.grad, far[name].lora_A.grad) < 0.15, name
            assert relative(near[name].lora_B.grad, far[name].lora_B.grad) < 0.15, name


def test_an_fp8_base_merges_into_fp8_or_bfloat16(fp8: Path, tmp_path: Path) -> None:
    model = disturbed(opened(fp8))
    exact = disturbed(opened(fp8, "dequantize"))
    name = "model.layers.1.self_attn.o_proj.weight"
    wanted = exact.model.layers["1"].self_attn.o_proj.merged()
    save_pretrained(model, model.config, tmp_path / "fp8")
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    assert stored[name].dtype == torch.float8_e4m3fn
    again = opened(tmp_path / "fp8")
    assert relative(again.model.layers["1"].self_attn.o_proj.dequantized(torch.float32), wanted) < 0.04
    untouched = "model.layers.1.mlp.experts.3.down_proj.weight"
    before = load_file(fp8 / "model.safetensors")
    assert torch.equal(stored[untouched].view(torch.uint8), before[untouched].view(torch.uint8))
    save_pretrained(model, model.config, tmp_path / "bf16", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "bf16" / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if "bias" not in name} == {torch.bfloat16}
    assert relative(stored[name], wanted) < 4e-3
    assert relative(logits(opened(tmp_path / "bf16")), logits(exact)) < 0.1


# --- files ---


def test_adapters_come_back_from_their_files(tmp_path: Path) -> None:
    model = disturbed(random_model(tiny.SMALL, 0))
    save_adapter(model, tmp_path / "a", "base")
    again = random_model(tiny.SMALL, 0)
    names = load_adapter(again, tmp_path / "a", torch.float32)
    assert names == [name for name, _ in adapters(model)]
    assert torch.equal(logits(again), logits(model))
    assert not any(p.requires_grad for n, p in again.named_parameters() if "lora" not in n)


def test_files_are_as_peft_names_modules_of_transformers(tmp_path: Path) -> None:
    """The tensors, put on transformers' own modules by name as PEFT does, make the same model."""
    transformers = pytest.importorskip("transformers")
    config = tiny.SMALL.replace(num_nextn_predict_layers=0)
    base = random_model(config, 0)
    save_pretrained(base, config, tmp_path / "base")
    model = disturbed(base, LoraSection(rank=4, alpha=12.0, targets=LoraSection().targets))
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    peft = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (peft["peft_type"], peft["r"], peft["lora_alpha"]) == ("LORA", 4, 12.0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    linear = {name: module for name, module in theirs.named_modules() if isinstance(module, torch.nn.Linear)}
    matched = {name for name in linear if any(name.endswith(f".{end}") for end in peft["target_modules"])}
    adapted = {name.removeprefix("base_model.model.").rsplit(".", 2)[0] for name in tensors}
    assert matched == adapted and len(tensors) == 2 * len(adapted)
    assert "self_attn.o_proj" in peft["target_modules"], "short names where all layers are adapted"
    with torch.no_grad():
        for name in adapted:
            a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            linear[name].weight += peft["lora_alpha"] / peft["r"] * b @ a
        expected = theirs(TOKENS).logits
    assert relative(logits(model), expected) < 1e-4


def test_targets_are_whole_names_where_a_short_one_would_match_too_much(tmp_path: Path) -> None:
    model = disturbed(random_model(tiny.SMALL, 0), LoraSection(rank=2, targets=("layers.1.self_attn.o_proj",)))
    save_adapter(model, tmp_path / "a", "base")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.o_proj"]


def test_damaged_and_foreign_adapters_are_refused(tmp_path: Path) -> None:
    model = disturbed(random_model(tiny.SMALL, 0))
    save_adapter(model, tmp_path / "a", "base")
    file, config = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    good, settings_ = load_file(file), json.loads(config.read_text())

    def refused(tensors: dict[str, torch.Tensor], **changes: object) -> str:
        save_file(tensors, file)
        config.write_text(json.dumps(settings_ | changes))
        with pytest.raises(UserError) as error:
            load_adapter(random_model(tiny.SMALL, 0), tmp_path / "a", torch.float32)
        return str(error.value)

    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert "but not its other half" in refused({k: v for k, v in good.items() if "0.mlp.up_proj" not in k})
    assert "no adapter of a projection" in refused(good | {name.replace("layers.0", "layers.9"): good[name].clone()})
    assert "this model needs [8, 32]" in refused(good | {name: torch.zeros(4, 7)} | {
        name.replace("up", "gate"): torch.zeros(4, 7)})  # fmt: skip
    assert "use_dora is set" in refused(good, use_dora=True)
    file.write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be read as a LoRA adapter"):
        load_adapter(random_model(tiny.SMALL, 0), tmp_path / "a", torch.float32)
    with pytest.raises(UserError, match="has an adapter already"):
        attach(model, EVERYTHING, torch.float32, 0)
    with pytest.raises(UserError, match="has no adapters to save"):
        save_adapter(random_model(tiny.SMALL, 0), tmp_path / "b", "base")


# --- a run ---


@pytest.mark.parametrize("merge", ["as-base", "none"])
def test_a_run_keeps_adapters_only_and_leaves_them_and_their_sum(tmp_path: Path, merge: str) -> None:
    data = tiny.prepare(tmp_path)
    before = load_file(data / "model" / "model.safetensors")
    log = tiny.run(
        tiny.config_of(data, tmp_path / "run", "lora.rank=4", "steps=30", "optim.lr=1e-2", f"lora.merge={merge}")
    )
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    checkpoint = load_file(tmp_path / "run" / "checkpoints" / "step-00000030" / "model.safetensors")
    assert all("lora_" in name or "bias" in name for name in checkpoint)
    optimizer = load_file(tmp_path / "run" / "checkpoints" / "step-00000030" / "optimizer.safetensors")
    assert all("lora_" in name for name in optimizer if name != "steps")
    place = tmp_path / "run" / ("model" if merge == "none" else "adapter")
    adapted = DeepseekV3.from_pretrained(data / "model")
    load_adapter(adapted, place, torch.float32)
    if merge == "none":
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} == {
            path.name for path in place.iterdir()
        } - {"tokenizer_config.json"}
        return
    merged = DeepseekV3.from_pretrained(tmp_path / "run" / "model")
    assert relative(logits(merged), logits(adapted)) < 1e-4
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("self_attn" in name or "shared_experts" in name for name in changed)


def test_a_run_over_an_fp8_base_learns(fp8: Path, tmp_path: Path) -> None:
    data = tiny.prepare(tmp_path)
    log = tiny.run(tiny.config_of(data, tmp_path / "run", f"model={fp8}", "lora.rank=4", "steps=20", "optim.lr=1e-2"))
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    checkpoint = load_file(tmp_path / "run" / "checkpoints" / "step-00000020" / "model.safetensors")
    assert not [name for name in checkpoint if "scale" in name]
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"


def test_a_run_does_not_go_on_beside_another_base(tmp_path: Path) -> None:
    data = tiny.prepare(tmp_path)
    tiny.run(tiny.config_of(data, tmp_path / "run", "lora.rank=2", "steps=2"))
    save_pretrained(
        random_model(tiny.SMALL, 1), tiny.SMALL, data / "model", also=lambda place: TOKENIZER.save(place, "v3")
    )
    with pytest.raises(UserError, match=r"is not the model that the adapters of .* belong to"):
        tiny.run(tiny.config_of(data, tmp_path / "run", "lora.rank=2", "steps=4"))


def test_an_adapted_projection_is_a_linear() -> None:
    model = disturbed(random_model(tiny.SMALL, 0))
    module = model.model.layers["0"].self_attn.o_proj
    assert isinstance(module, LoraLinear)
    x = torch.randn(3, 5, module.weight.shape[1])
    assert relative(module(x), x @ module.dequantized(torch.float32).T) < 1e-5
    assert module(x.bfloat16()).dtype == torch.bfloat16
