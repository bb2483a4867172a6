"""The model as a kit: any of its layers, on any device; cut up, recomputed, exported, compiled: always the same."""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import configs, random_model, relative
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import dsv3.backends.cpu  # noqa: F401  (its kernels are what runs)
from dsv3.core.cache import ContiguousCache
from dsv3.core.model import DeepseekV3
from dsv3.core.moe import Experts, LocalDispatcher, MoE
from dsv3.core.presets import PRESETS
from dsv3.core.step import Routing, packed
from dsv3.errors import UserError
from dsv3.ops.op import decompositions

V3 = PRESETS["deepseek-v3-671b"]
SMALL = PRESETS["dsv3-2m"].replace(vocab_size=50, hidden_size=64)
SOME = settings(deadline=None, max_examples=6, suppress_health_check=list(HealthCheck), derandomize=True)
SEEDS = st.integers(0, 1000)


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


# --- any part of it, anywhere ---


@pytest.mark.parametrize(
    ("layers", "embed", "head", "mtp", "parts"),
    [
        (range(0), True, False, False, {"embed_tokens"}),
        (range(0, 2), True, False, None, {"embed_tokens", "layers.0", "layers.1"}),
        (range(3, 5), False, False, False, {"layers.3", "layers.4"}),
        (range(60, 61), False, True, False, {"layers.60", "norm", "lm_head"}),
        (range(60, 61), False, True, None, {"embed_tokens", "layers.60", "layers.61", "norm", "lm_head"}),
        (range(0), False, False, True, {"embed_tokens", "layers.61"}),
    ],
)
def test_a_stage_holds_its_part_and_nothing_else(layers, embed, head, mtp, parts):
    model = DeepseekV3(V3, device="meta", layers=layers, embed=embed, head=head, mtp=mtp)

    def part(name: str) -> str:
        first, *rest = name.removeprefix("model.").split(".")
        return f"layers.{rest[0]}" if first == "layers" else first

    assert {part(name) for name, _ in model.named_parameters()} == parts


@settings(SOME, max_examples=15)
@given(st.lists(st.integers(0, 61), max_size=4))
def test_the_stages_together_have_the_parameters_of_the_whole(cuts):
    bounds = [0, *sorted(cuts), 61]
    whole = dict(DeepseekV3(V3, device="meta").named_parameters())
    found: set[str] = set()
    for start, stop in pairwise(bounds):
        last = stop == 61 and start < 61
        stage = DeepseekV3(V3, device="meta", layers=range(start, stop), embed=start == 0, head=last)
        for name, parameter in stage.named_parameters():
            assert parameter.shape == whole[name].shape
            found.add(name)
    assert found == set(whole)


def test_blocks_of_v3_run_forward_and_backward_on_fake_tensors():
    with FakeTensorMode():
        model = DeepseekV3(V3, dtype=torch.bfloat16, layers=range(2, 4), embed=False, head=False)
        x = torch.empty(256, V3.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        cu_seqlens = torch.tensor([0, 100, 256], dtype=torch.int32)
        routing = Routing(balance_sequences=cu_seqlens)
        y = model.blocks(x, model.step(torch.arange(256), cu_seqlens, 156, routing=routing, limit=4096))
        (y.float().sum() + sum(routing.balance.values())).backward()
    assert (y.shape, y.dtype, x.grad.shape) == (x.shape, torch.bfloat16, x.shape)
    assert routing.experts[3].shape == (256, 8) and routing.counts[3].shape == (256,)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None] == []
    assert grads["model.layers.3.mlp.experts.gate_up_proj.weight"].shape == (256, 4096, 7168)


def test_the_whole_of_v3_runs_on_the_meta_device():
    model = DeepseekV3(V3, device="meta", dtype=torch.bfloat16)
    with torch.no_grad():
        output = model(torch.zeros(2, 3, dtype=torch.long, device="meta"))
        hidden = model.mtp(0, output.hidden, torch.zeros(6, dtype=torch.long, device="meta"), output.step)
    assert output.logits.shape == (2, 3, 129280) and hidden.shape == (6, 7168)


def test_a_pass_over_fake_tensors_leaves_nothing_fake_behind():
    model = random_model(SMALL, 0)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad():
        with mode:
            model(tokens())
        assert type(model(tokens()).logits) is Tensor


@SOME
@given(data=st.data(), seed=SEEDS, lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3))
def test_two_half_models_in_a_row_are_the_whole(data, seed, lengths):
    config = data.draw(configs(mtp=1))
    cut = data.draw(st.integers(0, config.num_hidden_layers))
    whole = random_model(config, seed)
    first = DeepseekV3(config, layers=range(cut), head=False)
    second = DeepseekV3(config, layers=range(cut, config.num_hidden_layers), embed=False)
    weights = whole.state_dict()
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])  # tied: the last stage has its own
    for half in (first, second):
        half.load_state_dict({name: weights[name] for name in half.state_dict()})
    positions, cu_seqlens, longest = packed(lengths)
    ids = torch.randint(0, config.vocab_size, positions.shape, generator=torch.Generator().manual_seed(seed))
    step = first.step(positions, cu_seqlens, longest)
    with torch.no_grad():
        x = first.blocks(first.embed(ids), step)
        hidden = second.model.norm(second.blocks(x, step))
        want = whole(ids, cu_seqlens)
        torch.testing.assert_close(second.head(hidden), want.logits)
        torch.testing.assert_close(second.mtp(0, hidden, ids, step), whole.mtp(0, want.hidden, ids, step))


def test_a_stage_without_embedding_and_head_can_be_initialised():
    stage = DeepseekV3(SMALL, layers=range(1, 2), embed=False, head=False)
    stage.init_weights(0.5)
    assert stage.block(1).self_attn.o_proj.weight.std().item() == pytest.approx(0.5, rel=0.1)


# --- what it asks and what it returns ---


@SOME
@given(data=st.data(), seed=SEEDS, lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_the_last_logits_are_the_last_of_all(data, seed, lengths):
    model = random_model(data.draw(configs()), seed)
    positions, cu_seqlens, _ = packed(lengths)
    ids = positions % model.config.vocab_size
    with torch.no_grad():
        every = model(ids, cu_seqlens).logits
        last = model(ids, cu_seqlens, logits="last").logits
        none = model(ids, cu_seqlens, logits="none")
    torch.testing.assert_close(last, every[cu_seqlens[1:].long() - 1])
    assert none.logits is None and none.hidden.shape == (len(ids), model.config.hidden_size)


def test_float32_masters_of_projections_train_in_the_dtype_of_the_embedding():
    model = random_model(SMALL, 0)
    model.model.embed_tokens.to(torch.bfloat16)
    output = model(tokens())
    assert output.logits.dtype == torch.bfloat16
    output.logits.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if f"layers.{SMALL.num_hidden_layers}." not in name:  # the MTP module took no part
            assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype, name
    with torch.no_grad():
        assert relative(output.logits, random_model(SMALL, 0)(tokens()).logits) < 0.2


def test_shapes_that_contradict_each_other_are_refused():
    model = random_model(SMALL, 0)
    with pytest.raises(UserError, match=r"positions of shape \[9\] for input_ids of \[2, 9\]"):
        model(tokens(), positions=torch.arange(9))
    cache = ContiguousCache(SMALL, torch.zeros(SMALL.num_hidden_layers, 3, 0, SMALL.latent_dim))
    with pytest.raises(UserError, match="the cache is bound to 3 sequences, input_ids are 2"):
        model(tokens(), cache=cache)


# --- recomputation ---


@SOME
@given(data=st.data(), seed=SEEDS)
def test_recomputed_activations_give_the_same_loss_gradients_and_routing(data, seed):
    model = random_model(data.draw(configs()), seed).train()
    ids = torch.arange(12).view(2, 6) % model.config.vocab_size
    found = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        log = Routing(balance_sequences=torch.tensor([0, 6, 12], dtype=torch.int32))
        output = model(ids, routing=log)
        loss = output.logits.square().mean() + sum(log.balance.values())
        loss.backward()
        grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        found.append([loss.detach(), *log.counts.values(), *grads])
    assert len(found[0]) == len(found[1])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_recomputation_keeps_less_for_backward():
    model = random_model(SMALL, 0).train()
    kept = {}
    for recompute in (False, True):
        model.recompute, kept[recompute] = recompute, 0

        def pack(tensor: Tensor, recompute: bool = recompute) -> Tensor:
            kept[recompute] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens(length=40), logits="none")
    assert kept[True] < kept[False] / 4


# --- the dispatcher ---


class Elsewhere:
    """A dispatcher that brings tokens to their experts one by one."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor, compute: Experts) -> Tensor:
        self.seen.append(tuple(experts.shape))
        local = LocalDispatcher(len(compute.down_proj.weight))
        return torch.cat([local(x[i : i + 1], experts[i : i + 1], weights[i : i + 1], compute) for i in range(len(x))])


def test_a_dispatcher_from_outside_is_used_by_every_layer_with_experts():
    model = random_model(SMALL, 0)
    with torch.no_grad():
        want = model(tokens()).logits
        dispatcher = Elsewhere()
        for module in model.modules():
            if isinstance(module, MoE):
                module.dispatcher = dispatcher
        torch.testing.assert_close(model(tokens()).logits, want, rtol=1e-4, atol=1e-4)
    assert dispatcher.seen == [(18, SMALL.num_experts_per_tok)] * 3  # of 4 layers, the first of which is dense


@pytest.mark.parametrize("align", [2, 128])
def test_rows_of_experts_may_be_aligned(align):
    model = random_model(SMALL, 0)
    with torch.no_grad():
        want = model(tokens()).logits
        for module in model.modules():
            if isinstance(module, MoE):
                module.dispatcher = LocalDispatcher(SMALL.n_routed_experts, align)
        torch.testing.assert_close(model(tokens()).logits, want, rtol=1e-4, atol=1e-4)


# --- export and compilation ---


class Exported(nn.Module):
    """What other engines run: tokens, their positions and the past in, logits and the present out."""

    def __init__(self, model: DeepseekV3):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        cache = ContiguousCache(self.model.config, past)
        logits = self.model(ids, cache=cache, positions=positions).logits
        return logits, cache.present


@pytest.mark.slow
def test_an_exported_model_is_plain_pytorch_and_serves_any_batch_length_and_past():
    config = SMALL.replace(num_hidden_layers=2, max_position_embeddings=64)
    model = random_model(config, 0)

    def case(batch: int, length: int, past: int) -> tuple[Tensor, Tensor, Tensor]:
        latents = torch.randn(2, batch, past, config.latent_dim, generator=torch.Generator().manual_seed(batch))
        return tokens(batch, length), torch.arange(past, past + length).expand(batch, length), latents

    batch, length, past = (torch.export.Dim(name, min=low, max=60) for name, low in (("B", 1), ("S", 1), ("P", 0)))
    shapes = {"ids": {0: batch, 1: length}, "positions": {0: batch, 1: length}, "past": {1: batch, 2: past}}
    with torch.no_grad():
        program = torch.export.export(Exported(model), case(3, 4, 5), dynamic_shapes=shapes)
        assert "dsv3.mla_decode" in str(program.graph)
        lowered = program.run_decompositions(decompositions())
        assert "dsv3." not in str(lowered.graph)
        run, eager = lowered.module(), Exported(model)
        for arguments in (case(3, 4, 5), case(1, 1, 9), case(2, 7, 0), case(5, 1, 30)):
            for got, want in zip(run(*arguments), eager(*arguments), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "experts"])
def test_a_compiled_block_is_the_block(layer):
    model = random_model(SMALL, 0)
    positions, cu_seqlens, longest = packed([5, 4])
    step = model.step(positions, cu_seqlens, longest)
    block = model.block(layer)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for run in (block, compiled):
        x = torch.randn(9, SMALL.hidden_size, generator=torch.Generator().manual_seed(1)).requires_grad_()
        block.zero_grad()
        y = run(x, step)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(parameter.grad.clone() for parameter in block.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_model_is_compiled_once_for_all_lengths():
    model = random_model(SMALL.replace(num_hidden_layers=1, first_k_dense_replace=0), 0)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    with torch.no_grad():
        wanted = {length: model(tokens(length=length)).logits for length in (5, 8, 21)}
        graphs = set()
        for length, want in wanted.items():
            torch.testing.assert_close(compiled(tokens(length=length)).logits, want, rtol=1e-4, atol=1e-5)
            graphs.add(counter.frame_count)
    assert len(graphs) == 1 and graphs != {0}


# --- derived weights ---


def test_absorbed_weights_follow_writes_of_every_kind():
    model, other = random_model(SMALL, 0), random_model(SMALL, 1)
    past = torch.zeros(SMALL.num_hidden_layers, 2, 0, SMALL.latent_dim)

    def absorbed() -> Tensor:
        with torch.inference_mode():
            return model(tokens(), cache=ContiguousCache(SMALL, past)).logits

    first = absorbed()
    with torch.no_grad():
        model.load_state_dict(other.state_dict())
        want = other(tokens()).logits
    assert relative(first, want) > 0.1
    assert relative(absorbed(), want) < 1e-5
    weights = random_model(SMALL, 0).state_dict()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])  # PyTorch does not count these
    for name, buffer in model.named_buffers():
        buffer.data.copy_(weights[name])
    model.refresh()
    assert relative(absorbed(), first) < 1e-5


def test_what_is_made_anew_of_other_weights_is_not_written_into_the_ones_before():
    one_head = SMALL.replace(num_attention_heads=1)  # its values' part of kv_b_proj lies in one piece
    model, other = random_model(one_head, 0), random_model(one_head, 1)
    before = model.state_dict()
    kept = {name: tensor.clone() for name, tensor in before.items()}

    def absorbed(model):
        past = torch.zeros(one_head.num_hidden_layers, 1, 0, one_head.latent_dim)
        with torch.inference_mode():
            return model(torch.tensor([[1, 2, 3]]), cache=ContiguousCache(one_head, past)).logits

    absorbed(model)
    model.load_state_dict(other.state_dict(), assign=True)
    model.refresh()
    assert all(torch.equal(before[name], kept[name]) for name in kept)
    assert torch.equal(absorbed(model), absorbed(other))


def test_an_unknown_part_of_the_checkpoint_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="fp8 must be 'keep' or 'dequantize', not 'drop'"):
        DeepseekV3.from_pretrained(tmp_path, fp8="drop")
    with pytest.raises(UserError, match="a preset has a shape but no weights"):
        DeepseekV3.from_pretrained("dsv3-2m")
