"""What the processes of test_tensor_parallel.py run: first two of them, then all four. A module of its own: children
import it by name."""

import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spreading import FP8, TIED, V3, Sequences, close, pair, tokens_of
from two_processes import leave, run_checks

import dsv3.backends.cpu  # noqa: F401  (its kernels are what runs)
from dsv3.core.config import ModelConfig
from dsv3.core.model import DeepseekV3
from dsv3.core.moe import MoE
from dsv3.errors import UserError
from dsv3.ops.capture import capture
from dsv3.ops.collectives import all_gather, all_reduce
from dsv3.parallel.channel import FIRST, Channel, PeerLost
from dsv3.parallel.inference import exchange_within, idle, load_spread, spread
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.share import Share

WORLD = 4
Check = Callable[[int, str], None]
OF_TWO: dict[str, Check] = {}
OF_FOUR: dict[str, Check] = {}


def of(checks: dict[str, Check]) -> Callable[[Check], Check]:
    """Add function(rank, folder) to the checks; it runs on all ranks."""

    def add(function: Check) -> Check:
        checks[function.__name__] = function
        return function

    return add


# ---------------------------------------------------------------------------------------------- two processes: tp = 2


def same_everywhere(values: torch.Tensor, mesh: Mesh) -> None:
    """Gates choose by these values on every rank: a bit of difference may send a token to other experts."""
    everyones = all_gather(values[None].contiguous(), mesh.tp_group)
    assert all(torch.equal(values, other) for other in everyones)


@of(OF_TWO)
@torch.no_grad()
def logits_are_the_whole_models(rank: int, folder: str) -> None:
    mesh = Mesh.over_world(tp=2)
    for config in (V3, TIED):
        whole, part = pair(config, mesh)
        tokens = tokens_of(config, 1, 2, 9)
        want, got = whole(tokens), part(tokens)
        close(got.logits, want.logits)
        same_everywhere(got.logits, mesh)
        last = part(tokens, logits="last").logits
        close(last, want.logits[:, -1])
        assert part(tokens, logits="none").logits is None
        if config.num_nextn_predict_layers:
            shifted = tokens.roll(-1, 1).flatten()
            hidden = [model.mtp(0, out.hidden, shifted, out.step) for model, out in ((whole, want), (part, got))]
            close(hidden[1], hidden[0])
            close(part.head(hidden[1]), whole.head(hidden[0]))


@of(OF_TWO)
def a_rank_holds_half_of_what_is_cut(rank: int, folder: str) -> None:
    mesh = Mesh.over_world()
    whole, part = pair(V3, mesh)
    sizes = {name: tensor.numel() for name, tensor in part.named_parameters()}
    for name, tensor in whole.named_parameters():
        assert sizes[name] == tensor.numel() // (2 if Share(V3, mesh).cut(name) else 1), name
    assert part.config.num_attention_heads == 2
    assert sum(tensor.nbytes for tensor in part.state_dict().values()) == Share(V3, mesh).bytes(torch.float32).total


@of(OF_TWO)
def chunked_prefill_and_decoding_with_a_paged_cache(rank: int, folder: str) -> None:
    mesh = Mesh.over_world(tp=2)
    whole, part = pair(V3, mesh)
    one, other = Sequences(whole, 2), Sequences(part, 2)
    chunks = [([7, 3], False), ([2, 5], False), ([1, 1], True), ([2, 2], True)]
    for i, (lengths, absorbed) in enumerate(chunks):
        tokens = [tokens_of(V3, 10 * i + j, n) for j, n in enumerate(lengths)]
        want, got = one.forward(tokens, absorbed), other.forward(tokens, absorbed)
        close(got[0], want[0])
        close(got[1], want[1])
        same_everywhere(got[1], mesh)


def bytes_read() -> int:
    """What this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@of(OF_TWO)
@torch.no_grad()
def a_checkpoint_is_read_in_part(rank: int, folder: str) -> None:
    mesh, model = Mesh.over_world(tp=2), Path(folder, "v3")
    size = (model / "model.safetensors").stat().st_size
    before = bytes_read()
    part = load_spread(model, mesh)
    read = bytes_read() - before
    held = sum(tensor.nbytes for tensor in part.state_dict().values())
    assert held < read < 0.75 * size, (held, read, size)
    whole = DeepseekV3.from_pretrained(model)
    tokens = tokens_of(V3, 2, 1, 7)
    close(part(tokens).logits, whole(tokens).logits)


@of(OF_TWO)
@torch.inference_mode()
def fp8_weights_are_cut_with_their_scales(rank: int, folder: str) -> None:
    mesh, directory = Mesh.over_world(tp=2), Path(folder, "fp8")
    tokens = tokens_of(FP8, 3, 2, 5)
    whole = DeepseekV3.from_pretrained(directory, dtype=torch.float32)
    want = whole(tokens).logits
    loaded = load_spread(directory, mesh, torch.float32)
    assert loaded.block(1).mlp.shared_experts.gate_up_proj.weight.dtype == torch.float8_e4m3fn
    assert loaded.block(0).self_attn.o_proj.weight_scale_inv.shape == (1, 1)
    close(loaded(tokens).logits, want)
    held = sum(tensor.nbytes for tensor in loaded.state_dict().values() if tensor is not None)
    assert held == Share(FP8, mesh).bytes(torch.float32, fp8=True).total
    close(spread(DeepseekV3.from_pretrained(directory, dtype=torch.float32), mesh)(tokens).logits, want)
    floats = DeepseekV3.from_pretrained(directory, dtype=torch.float32, fp8="dequantize")
    close(load_spread(directory, mesh, torch.float32, fp8="dequantize")(tokens).logits, floats(tokens).logits)


@of(OF_TWO)
def a_cut_through_fp8_blocks_is_refused(rank: int, folder: str) -> None:
    mesh, directory = Mesh.over_world(tp=2), Path(folder, "small_blocks")
    refuses(lambda: load_spread(directory, mesh), "FP8 in blocks of 128 x 128, which a piece of 64 cuts through")
    whole = DeepseekV3.from_pretrained(directory)
    refuses(lambda: spread(whole, mesh), "FP8 in blocks of 128 x 128, which a piece of 64 cuts through")


def refuses(run: Callable[[], object], text: str) -> None:
    with pytest.raises(UserError) as error:
        run()
    assert text in str(error.value) and "\n" not in str(error.value)


@of(OF_TWO)
def a_mesh_that_is_not_the_world_is_refused(rank: int, folder: str) -> None:
    refuses(lambda: Mesh.over_world(tp=2, dp=2), "tp = 2, dp = 2 need 4 processes, and there are 2")
    refuses(lambda: Mesh.over_world(dp=3), "need 3 processes, and there are 2")


# ------------------------------------------------------------------------------------ four processes: dp, experts, talk

EXCHANGES = (None, 12)  # counted, and within the bound of the most tokens that any group brings below


@of(OF_FOUR)
@torch.no_grad()
def groups_of_two_with_tokens_of_their_own(rank: int, folder: str) -> None:
    mesh = Mesh.over_world(tp=2, dp=2)
    assert mesh.leaders == [0, 2] and (mesh.dp_rank, mesh.tp_rank) == divmod(rank, 2)
    for config in (V3, TIED):
        whole, part = pair(config, mesh)
        assert part.block(1).mlp.experts.gate_up_proj.weight.shape[0] == 2  # of 8, over all four ranks
        for capacity in EXCHANGES:
            exchange_within(part, capacity)
            lengths = [5, 4] if mesh.dp_rank == 0 else [1]  # also fewer tokens than ranks that share them
            tokens = torch.cat([tokens_of(config, 5 * mesh.dp_rank + i, n) for i, n in enumerate(lengths)])
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
            got = part(tokens, cu_seqlens).logits
            close(got, whole(tokens, cu_seqlens).logits)
            same_everywhere(got, mesh)
            if mesh.dp_rank == 1:  # the other group goes on alone
                idle(part)
            else:
                close(part(tokens).logits, whole(tokens).logits)


@of(OF_FOUR)
def a_step_within_a_bound_can_be_captured(rank: int, folder: str) -> None:
    mesh = Mesh.over_world(tp=2, dp=2)
    whole, part = pair(V3, mesh)
    exchange_within(part, 6)
    step = capture(lambda tokens: part(tokens).logits, tokens_of(V3, 1, 2, 3))
    for seed in (2, 3):
        tokens = tokens_of(V3, seed + 10 * mesh.dp_rank, 2, 3)
        close(step.replay(tokens), whole(tokens).logits.detach())


@of(OF_FOUR)
def caches_of_groups_go_their_own_ways(rank: int, folder: str) -> None:
    mesh = Mesh.over_world(tp=2, dp=2)
    whole, part = pair(V3, mesh)
    batch = 1 + mesh.dp_rank
    one, other = Sequences(whole, batch), Sequences(part, batch)
    steps = ([6, 1, 1], [3, 4, 1])[mesh.dp_rank]  # one group decodes while the other prefills
    for i, length in enumerate(steps):
        tokens = [tokens_of(V3, 100 * mesh.dp_rank + 10 * i + j, length) for j in range(batch)]
        want, got = one.forward(tokens, length == 1), other.forward(tokens, length == 1)
        close(got[0], want[0])


@of(OF_FOUR)
@torch.inference_mode()
def experts_over_all_ranks_while_some_are_idle(rank: int, folder: str) -> None:
    mesh = Mesh.over_world(tp=1, dp=4)
    whole, part = pair(V3, mesh)
    assert sum(p.numel() for p in part.parameters()) == sum(p.numel() for p in whole.parameters()) - 3 * 6 * (
        3 * V3.hidden_size * V3.moe_intermediate_size
    )
    for capacity in EXCHANGES:
        exchange_within(part, capacity)
        for busy in ([0], [1, 3], [0, 1, 2, 3]):
            if rank not in busy:
                idle(part)
                idle(part, mtp_depth=0)
                continue
            tokens = tokens_of(V3, rank, 3 + 3 * rank)
            want, got = whole(tokens), part(tokens)
            close(got.logits, want.logits)
            shifted = tokens.roll(-1)
            close(part.mtp(0, got.hidden, shifted, got.step), whole.mtp(0, want.hidden, shifted, want.step))


@of(OF_FOUR)
@torch.inference_mode()
def fp8_experts_while_all_but_one_are_idle(rank: int, folder: str) -> None:
    mesh, directory = Mesh.over_world(tp=1, dp=4), Path(folder, "fp8")
    part = load_spread(directory, mesh, torch.float32)
    tokens = tokens_of(FP8, 4, 6)
    want = DeepseekV3.from_pretrained(directory, dtype=torch.float32)(tokens).logits if rank == 2 else None
    for capacity in EXCHANGES:
        exchange_within(part, capacity)
        if want is None:
            idle(part)
        else:
            close(part(tokens).logits, want)


@of(OF_FOUR)
def messages_arrive_as_they_were_sent(rank: int, folder: str) -> None:
    channel = Channel(timedelta(seconds=20))
    small = {"tokens": torch.arange(3), "none": torch.empty(0, 4), "flag": torch.tensor(True)}
    large = {"table": torch.arange(30_000, dtype=torch.int32).view(100, 300).T, "x": torch.arange(5).bfloat16()}
    for kind, tensors in (("decode", small), ("prefill", large), ("stop", {})):
        if rank == 0:
            channel.send(kind, tensors)
            continue
        got, received = channel.receive()
        assert got == kind and list(received) == list(tensors)
        for name, tensor in tensors.items():
            assert received[name].dtype == tensor.dtype and torch.equal(received[name], tensor)
    mine = {"tokens": torch.arange(rank * FIRST)}  # the first fits into a small message, the others do not
    gathered = channel.gather(mine if rank % 2 == 0 else None, senders=[0, 2])
    assert [len(each["tokens"]) for each in gathered] == ([0, 2 * FIRST] if rank == 0 else [])
    channel.barrier()


@of(OF_FOUR)
def a_driver_with_nothing_to_do_is_not_lost(rank: int, folder: str) -> None:
    channel = Channel(timedelta(seconds=2))
    if rank == 0:
        for _ in range(30):
            time.sleep(0.1)
            channel.beat()
        channel.send("work")
    else:
        assert channel.receive() == ("work", {})


SOON = 20.0  # seconds; on a machine with much else to do


def loses(run: Callable[[], object], text: str) -> None:
    begin = time.monotonic()
    with pytest.raises(PeerLost, match=text):
        run()
    assert time.monotonic() - begin < SOON


@of(OF_FOUR)
def silence_is_a_loss(rank: int, folder: str) -> None:
    channel = Channel(timedelta(seconds=0.5))
    if rank == 0:
        loses(lambda: channel.gather({}, senders=[0, 3]), "rank 3 is gone, or silent for 0.5 s")
    elif rank == 1:
        loses(channel.receive, "the driver is gone, or silent for 0.5 s")


def a_death_is_an_error_on_the_others(rank: int, folder: str) -> None:
    """The last check of a world, which does not outlive it: rank 3 ends, and the rest wait for it, less than asked."""
    meeting, patience = f"file://{folder}/last_rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=patience)
    channel = Channel(patience)
    if rank == 0:
        loses(lambda: channel.gather({}, senders=[3]), "rank 3 is gone")
    elif rank == 1:
        loses(channel.barrier, "another rank")
    elif rank == 2:
        begin = time.monotonic()
        with pytest.raises(RuntimeError):
            all_reduce(torch.ones(3), dist.group.WORLD.group_name)
        assert time.monotonic() - begin < SOON


def dry_run(world: int, tp: int, dp: int, rank: int, config: ModelConfig) -> None:
    """A pass of one rank's part under FakeTensorMode, with a group that has no peers."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        mesh = Mesh.over_world(tp, dp)
        with FakeTensorMode(), torch.no_grad():
            model = spread(DeepseekV3(config, "cpu", torch.bfloat16), mesh)
            exchange_within(model, 16)
            output = model(torch.zeros(2, 8, dtype=torch.int64))
            assert output.logits.shape == (2, 8, config.vocab_size)
            assert output.hidden.shape == (16, config.hidden_size)
            experts = [module.experts for module in model.modules() if isinstance(module, MoE)]
            assert {e.gate_up_proj.weight.shape[0] for e in experts} == {config.n_routed_experts // world}
    finally:
        dist.destroy_process_group()


def dry_runs_of_the_671b_model(rank: int, folder: str) -> None:
    config = ModelConfig.from_pretrained("deepseek-v3-671b").replace(num_hidden_layers=5)
    dry_run(8, tp=8, dp=1, rank=5, config=config)
    dry_run(16, tp=2, dp=8, rank=9, config=config)


def run(rank: int, folder: str) -> None:
    """folder: with the checkpoints; the processes meet and leave their failures there."""
    failures: dict[str, str] = {}
    if rank < 2:
        failures |= run_checks(rank, f"{folder}/two", {name: _in(folder, check) for name, check in OF_TWO.items()})
    elif rank == 2:
        failures |= _alone(dry_runs_of_the_671b_model, rank, folder)
    of_four = {name: _in(folder, check) for name, check in OF_FOUR.items()}
    failures |= run_checks(rank, f"{folder}/four", of_four, WORLD)
    failures |= _alone(a_death_is_an_error_on_the_others, rank, folder)
    leave(failures, rank, folder)


def _in(folder: str, check: Check) -> Check:
    return lambda rank, group: check(rank, folder)


def _alone(check: Check, rank: int, folder: str) -> dict[str, str]:
    try:
        check(rank, folder)
    except Exception:
        return {check.__name__: traceback.format_exc()}
    return {}
