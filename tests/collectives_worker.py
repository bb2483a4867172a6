"""What the two processes of test_collectives.py run. A module of its own: children import it by name."""

import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from two_processes import WORLD, leave, run_checks

import dsv3.backends.cpu  # noqa: F401  (its kernels are what runs)
from dsv3.ops import collectives, moe

TOKENS, DIM, EXPERTS, K = 12, 8, 6, 3  # tokens per rank
CHECKS: dict[str, Callable[[int, str], None]] = {}


def check(function: Callable[[int, str], None]) -> Callable[[int, str], None]:
    """Add function(rank, group name) to the checks; it runs on both ranks."""
    CHECKS[function.__name__] = function
    return function


def of_rank(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def everyones(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [of_rank(rank, *shape, dtype=dtype) for rank in range(WORLD)]


@check
def all_reduce_sums(rank: int, group: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        ours = [(x * 8).to(dtype) for x in everyones(5, 3)]
        before = ours[rank].clone()
        assert torch.equal(collectives.all_reduce(ours[rank], group), ours[0] + ours[1])
        assert torch.equal(ours[rank], before)  # not in place


@check
def all_gather_concatenates_by_rank(rank: int, group: str) -> None:
    for dtype in (torch.float32, torch.float8_e4m3fn):
        ours = everyones(4, 3, dtype=dtype)
        gathered = collectives.all_gather(ours[rank], group)
        assert gathered.dtype == dtype and torch.equal(gathered.float(), torch.cat([x.float() for x in ours]))


@check
def reduce_scatter_leaves_each_rank_its_rows_of_the_sum(rank: int, group: str) -> None:
    ours = everyones(6, 3)
    assert torch.equal(collectives.reduce_scatter(ours[rank], group), sum(ours)[rank * 3 : rank * 3 + 3])


@check
def all_to_all_with_uneven_and_empty_splits(rank: int, group: str) -> None:
    sends = [[0, 3], [4, 1]]  # from rank to rank
    ours = [of_rank(r, sum(sends[r]), 2) for r in range(WORLD)]
    received = collectives.all_to_all(ours[rank], [sends[r][rank] for r in range(WORLD)], sends[rank], group)
    assert torch.equal(received, torch.cat([x.split(sends[r])[rank] for r, x in enumerate(ours)]))


@check
def gradients_are_those_of_the_sum_of_all_losses(rank: int, group: str) -> None:
    splits = [[1, 3], [2, 2]]
    runs: dict[str, Callable[[Tensor], Tensor]] = {
        "all_reduce": lambda x: collectives.all_reduce(x, group),
        "all_gather": lambda x: collectives.all_gather(x, group),
        "reduce_scatter": lambda x: collectives.reduce_scatter(x, group),
        "all_to_all": lambda x: collectives.all_to_all(x, [s[rank] for s in splits], splits[rank], group),
    }
    together: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
        "all_reduce": lambda xs: [xs[0] + xs[1]] * 2,
        "all_gather": lambda xs: [torch.cat(xs)] * 2,
        "reduce_scatter": lambda xs: list((xs[0] + xs[1]).chunk(2)),
        "all_to_all": lambda xs: [torch.cat([x.split(splits[r])[to] for r, x in enumerate(xs)]) for to in range(2)],
    }
    for name, run in runs.items():
        mine = of_rank(rank, 4, 2).requires_grad_()
        out = run(mine)
        (out * of_rank(10 + rank, *out.shape)).sum().backward()
        all_of = [x.requires_grad_() for x in everyones(4, 2)]
        losses = [(y * of_rank(10 + r, *y.shape)).sum() for r, y in enumerate(together[name](all_of))]
        sum(losses).backward()
        torch.testing.assert_close(mine.grad, all_of[rank].grad, msg=name)


def routed(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of a rank, their experts (expert 4 stays empty; rank 1 sends little to itself) and gate weights."""
    scores = of_rank(20 + rank, TOKENS, EXPERTS)
    scores[:, 4] = -100.0
    scores[:, 0] += 2.0
    return of_rank(rank, TOKENS, DIM), scores.topk(K).indices.int(), of_rank(30 + rank, TOKENS, K).sigmoid()


def experts_of(x: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Row-wise experts: silu(x * weight), each expert on its segment."""
    bounds = offsets.tolist()
    parts = [
        torch.nn.functional.silu(x[begin:end] * w) for begin, end, w in zip(bounds, bounds[1:], weights, strict=False)
    ]
    return torch.cat(parts)


def alone() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The layer in one process -> output and the gradients of tokens, gate weights and experts."""
    parts = [routed(rank) for rank in range(WORLD)]
    x, idx, w = (torch.cat(column) for column in zip(*parts, strict=True))
    experts = of_rank(99, EXPERTS, DIM).requires_grad_()
    x.requires_grad_(), w.requires_grad_()
    permuted, row_map, offsets = moe.permute(x, idx, EXPERTS, 1)
    y = moe.unpermute(experts_of(permuted, offsets, experts), row_map, w)
    (y * of_rank(77, WORLD * TOKENS, DIM)).sum().backward()
    return y.detach(), x.grad, w.grad, experts.grad


@check
def expert_parallel_layer_equals_one_process_bit_for_bit(rank: int, group: str) -> None:
    x, idx, w = routed(rank)
    local = EXPERTS // WORLD
    experts = of_rank(99, EXPERTS, DIM)[rank * local : (rank + 1) * local].clone().requires_grad_()
    x.requires_grad_(), w.requires_grad_()
    in_splits, out_splits = collectives.ep_splits(idx, EXPERTS, group)
    received, expert, handle = collectives.ep_dispatch(x, idx, EXPERTS, in_splits, out_splits, group)
    permuted, row_map, offsets = moe.permute(received, expert[:, None], local, 1)
    answers = moe.unpermute(experts_of(permuted, offsets, experts), row_map, None)
    rows = collectives.ep_combine(answers, handle, in_splits, out_splits, group)
    places = torch.arange(TOKENS * K, dtype=torch.int32).view(TOKENS, K)
    y = moe.unpermute(rows, places, w)
    mine = slice(rank * TOKENS, (rank + 1) * TOKENS)
    (y * of_rank(77, WORLD * TOKENS, DIM)[mine]).sum().backward()
    want_y, want_x, want_w, want_experts = alone()
    assert torch.equal(y, want_y[mine])
    assert torch.equal(x.grad, want_x[mine])
    assert torch.equal(w.grad, want_w[mine])
    assert torch.equal(experts.grad, want_experts[rank * local : (rank + 1) * local])


@check
def counts_say_what_will_be_sent_and_received(rank: int, group: str) -> None:
    sent, received = collectives.ep_counts(routed(rank)[1], EXPERTS, group)
    local = EXPERTS // WORLD
    everyone = torch.stack([moe.expert_count(routed(r)[1], EXPERTS) for r in range(WORLD)])
    assert torch.equal(sent, everyone[rank])
    assert torch.equal(received, everyone[:, rank * local : (rank + 1) * local])


@check
def dispatch_carries_fp8_and_its_scales(rank: int, group: str) -> None:
    _, idx, _ = routed(rank)
    splits = collectives.ep_splits(idx, EXPERTS, group)
    full = of_rank(rank, TOKENS, DIM)
    small = full.to(torch.float8_e4m3fn)
    exact, *_ = collectives.ep_dispatch(small.float(), idx, EXPERTS, *splits, group)
    received, _, handle = collectives.ep_dispatch(small, idx, EXPERTS, *splits, group)
    assert received.dtype == small.dtype and torch.equal(received.float(), exact)
    back = collectives.ep_combine(received, handle, *splits, group)
    assert torch.equal(back.float(), small.float().repeat_interleave(K, 0))


@check
def masked_dispatch_brings_the_same_rows_as_dispatch(rank: int, group: str) -> None:
    x, idx, _ = routed(rank)
    x, idx = x[: TOKENS - 5 * rank], idx[: TOKENS - 5 * rank]  # ranks need not have equally many
    local, capacity = EXPERTS // WORLD, TOKENS + 1
    splits = collectives.ep_splits(idx, EXPERTS, group)
    rows, expert, _ = collectives.ep_dispatch(x, idx, EXPERTS, *splits, group)
    received, counts, handle = collectives.ep_dispatch_masked(x, idx, EXPERTS, capacity, group)
    assert received.shape == (local, WORLD * capacity, DIM)
    for e in range(local):
        assert torch.equal(received[e, : counts[e]], rows[expert == e]) and not received[e, counts[e] :].any()
    used = torch.arange(WORLD * capacity) < counts[:, None]
    answers = torch.where(used[..., None], received * 2, float("nan"))
    assert torch.equal(collectives.ep_combine_masked(answers, handle, group), (x * 2).repeat_interleave(K, 0))


@check
def a_rank_without_tokens_takes_part(rank: int, group: str) -> None:
    x, idx, _ = routed(rank)
    x, idx = (x, idx) if rank == 0 else (x[:0], idx[:0])
    splits = collectives.ep_splits(idx, EXPERTS, group)
    received, _, handle = collectives.ep_dispatch(x, idx, EXPERTS, *splits, group)
    assert torch.equal(collectives.ep_combine(received, handle, *splits, group), x.repeat_interleave(K, 0))
    masked, counts, handle = collectives.ep_dispatch_masked(x, idx, EXPERTS, TOKENS, group)
    assert int(counts.sum()) == len(received)
    assert torch.equal(collectives.ep_combine_masked(masked, handle, group), x.repeat_interleave(K, 0))


@check
def more_tokens_than_capacity_is_an_error(rank: int, group: str) -> None:
    x, idx, _ = routed(rank)
    try:
        collectives.ep_dispatch_masked(x, idx, EXPERTS, TOKENS - 1, group)
    except RuntimeError as error:
        assert "capacity" in str(error)
    else:
        raise AssertionError("dropped tokens in silence")


@check
def experts_that_do_not_divide_over_the_ranks_are_an_error(rank: int, group: str) -> None:
    try:
        collectives.ep_counts(routed(rank)[1], EXPERTS + 1, group)
    except RuntimeError as error:
        assert "7 experts do not divide over 2 ranks" in str(error)
    else:
        raise AssertionError("accepted")


def dry_run_of_2048_ranks() -> None:
    """Shapes of every exchange under FakeTensorMode with a group that has no peers: what planning runs on."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=2048)
    world = dist.group.WORLD.group_name
    experts = dist.new_group(list(range(64))).group_name
    splits = [512] * 64
    with FakeTensorMode():
        x, idx = torch.empty(4096, 128, requires_grad=True), torch.empty(4096, 8, dtype=torch.int32)
        assert collectives.all_gather(x, world).shape == (4096 * 2048, 128)
        assert collectives.reduce_scatter(x, world).shape == (2, 128)
        assert collectives.all_reduce(x, world).shape == x.shape
        received, expert, handle = collectives.ep_dispatch(x, idx, 256, splits, splits, experts)
        assert received.shape == (512 * 64, 128) and expert.shape == (512 * 64,)
        rows = collectives.ep_combine(received, handle, splits, splits, experts)
        assert rows.shape == (4096 * 8, 128)
        rows.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
        masked, counts, handle = collectives.ep_dispatch_masked(x.detach(), idx, 256, 4096, experts)
        assert masked.shape == (4, 64 * 4096, 128) and counts.shape == (4,)
        assert collectives.ep_combine_masked(masked, handle, experts).shape == (4096 * 8, 128)
    dist.destroy_process_group()


def run(rank: int, folder: str) -> None:
    failures = run_checks(rank, folder, CHECKS)
    if rank == 0:
        try:
            dry_run_of_2048_ranks()
        except Exception:
            failures[dry_run_of_2048_ranks.__name__] = traceback.format_exc()
    leave(failures, rank, folder)
