"""A model spread over processes: tensor parallelism, experts over all ranks, attention with tokens of each group's own.

What needs several processes is checked in tensor_parallel_worker.py, in one start of four of them.
"""

from pathlib import Path

import pytest
import tensor_parallel_worker as worker
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import configs, random_model
from safetensors.torch import save_file
from spreading import FP8, V3
from two_processes import assert_passed, run_everywhere

from dsv3.core.checkpoint import save_pretrained
from dsv3.core.config import ModelConfig
from dsv3.core.model import DeepseekV3
from dsv3.core.names import hf_tensors
from dsv3.core.safetensors_file import read_header
from dsv3.errors import UserError
from dsv3.parallel.channel import FIRST, _packed, _room_for, _unpacked
from dsv3.parallel.inference import load_spread, spread
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.share import Share

OF_TWO = [*worker.OF_TWO, worker.dry_runs_of_the_671b_model.__name__]
OF_FOUR = [*worker.OF_FOUR, worker.a_death_is_an_error_on_the_others.__name__]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the checkpoints are that the processes load."""
    folder = tmp_path_factory.mktemp("spread")
    save_pretrained(random_model(V3, 0), V3, folder / "v3")
    save_pretrained(random_model(FP8, 0), FP8, folder / "fp8", fp8=True)
    small = FP8.replace(intermediate_size=128)
    save_pretrained(random_model(small, 0), small, folder / "small_blocks", fp8=True)
    return folder


@pytest.fixture(scope="module")
def failures(folder) -> list[dict[str, str]]:
    """One start of the processes serves every check."""
    for world in ("two", "four"):
        (folder / world).mkdir()
    return run_everywhere(worker.run, folder, worker.WORLD)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_TWO)
def test_two_processes(failures, name):
    assert_passed(failures, name, OF_TWO)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes(failures, name):
    assert_passed(failures, name, OF_FOUR)


def joined(name: str, pieces: list[torch.Tensor], share: Share) -> torch.Tensor:
    cut = share.cut(name)
    if cut is None:
        return pieces[0]
    banded = [piece.unflatten(cut.dim, (cut.bands, -1)) for piece in pieces]
    return torch.cat(banded, cut.dim + 1).flatten(cut.dim, cut.dim + 1)


@settings(max_examples=25, deadline=None)
@given(config=configs(mtp=1), tp=st.sampled_from([1, 2, 4]), dp=st.sampled_from([1, 2]))
def test_the_parts_of_all_ranks_are_the_whole_or_the_model_is_refused(config: ModelConfig, tp: int, dp: int):
    shares = []
    try:
        shares = [Share(config, Mesh(tp, dp, rank)) for rank in range(tp * dp)]
    except UserError as error:
        assert "\n" not in str(error) and ("does not divide" in str(error) or "do not divide" in str(error))
        return
    whole = dict(random_model(config, 0).named_parameters())
    parts = [dict(spread(random_model(config, 0), share.mesh).named_parameters()) for share in shares]
    for name, tensor in whole.items():
        pieces = [part[name] for part in parts]
        ranks = pieces if ".experts." in name else pieces[:tp]  # every group has the same of all else
        assert torch.equal(joined(name, ranks, shares[0]), tensor)
        assert all(torch.equal(piece, pieces[i % len(ranks)]) for i, piece in enumerate(pieces))
    for share, part in zip(shares, parts, strict=True):
        gates = 4 * sum(tensor.numel for tensor in hf_tensors(config) if tensor.kind == "bias")
        assert share.bytes(torch.float32).total == gates + sum(tensor.nbytes for tensor in part.values())


@pytest.mark.parametrize(("tp", "dp", "gigabytes"), [(8, 1, 86.80), (1, 8, 102.69), (16, 1, 44.08), (2, 8, 52.03)])
def test_a_rank_of_the_671b_model_holds_its_share(tp: int, dp: int, gigabytes: float):
    """gigabytes: in FP8; in all ranks together, 684,531,386,000 bytes and more, of what several hold."""
    config, ranks = ModelConfig.from_pretrained("deepseek-v3-671b"), tp * dp
    mesh = Mesh(tp, dp, rank=ranks - 1)
    model = spread(DeepseekV3(config, "meta", torch.bfloat16), mesh)
    share = Share(config, mesh)
    held = share.bytes(torch.bfloat16)
    biases = 2 * 256 * 59  # of the gates, which are float32
    assert held.total - biases == 2 * model.num_parameters()
    experts = 59 * 256 * 3 * 7168 * 2048
    assert held.routed_experts == 2 * experts // ranks
    assert held.embedding_and_head == 2 * 2 * 129280 * 7168 // tp
    small = share.bytes(fp8=True)
    assert small.routed_experts == (experts + 4 * experts // 128**2) // ranks
    assert small.total == pytest.approx(gigabytes * 1e9, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "tp", "dp", "text"),
    [
        ({}, 3, 1, "tp = 3 does not divide the 4 attention heads of this model; 2 would do, or 4"),
        ({"vocab_size": 97}, 2, 1, "tp = 2 does not divide the 97 tokens of the vocabulary of this model; 1 would do"),
        ({"intermediate_size": 41}, 2, 1, "columns of the dense layers (intermediate_size)"),
        ({"moe_intermediate_size": 25}, 2, 1, "the 25 columns of the shared experts"),
        ({}, 1, 3, "the 8 routed experts of this model do not divide over tp x dp = 3 processes; 2 would do, or 4"),
        ({}, 0, 1, "tp and dp must be at least 1"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(changes, tp, dp, text):
    with pytest.raises(UserError) as error:
        Share(V3.replace(**changes), Mesh(tp, dp))
    assert text in str(error.value) and "\n" not in str(error.value)


def test_one_process_has_the_whole_model(folder):
    loaded, tokens = load_spread(folder / "v3", Mesh.over_world()), torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, random_model(V3, 0)(tokens).logits)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), columns=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_piece_of_a_stored_tensor_is_read_as_it_would_be_sliced(tmp_path_factory, data, columns: bool, dtype):
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 7)))
    whole = torch.randn(shape).to(dtype)
    path = tmp_path_factory.mktemp("piece") / "model.safetensors"
    save_file({"before": torch.zeros(3), "w": whole}, path)
    dim = int(columns)
    start = data.draw(st.integers(0, shape[dim]))
    length = data.draw(st.integers(0, shape[dim] - start))
    (stored,) = (tensor for tensor in read_header(path) if tensor.name == "w")
    assert torch.equal(stored.narrow(dim, start, length).read(), whole.narrow(dim, start, length))


@settings(max_examples=50, deadline=None)
@given(data=st.data(), kind=st.text(max_size=10))
def test_any_tensors_go_into_a_message_and_come_out_again(data, kind: str):
    dtypes = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16, torch.float8_e4m3fn]
    shapes = st.lists(st.integers(0, 40), max_size=3)
    kinds = data.draw(st.dictionaries(st.text(max_size=5), st.tuples(st.sampled_from(dtypes), shapes), max_size=4))
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in kinds.items()}
    message = _packed(kind, tensors)
    arrived = _room_for(message[:FIRST])
    arrived[FIRST:] = message[FIRST:]
    got, received = _unpacked(arrived)
    assert got == kind and list(received) == list(tensors)
    for name, tensor in tensors.items():
        assert received[name].dtype == tensor.dtype and torch.equal(received[name].float(), tensor.float())


def test_a_preset_has_no_weights_to_spread():
    with pytest.raises(UserError, match="a preset has a shape but no weights"):
        load_spread("deepseek-v3-671b", Mesh())


def test_tensors_without_elements_or_with_odd_strides_go_into_a_message():
    odd = {"one": torch.ones(1, dtype=torch.int64).as_strided((1, 1), (1, 0)), "none": torch.empty(0, 3).T}
    _, tensors = _unpacked(_room_for(_packed("", odd)))
    assert torch.equal(tensors["one"], odd["one"]) and tensors["none"].shape == (3, 0)
