"""Communication: collectives over a process group, and the exchange of tokens between ranks that own experts.

A schema cannot hold a process group, so `group` is its name (`ProcessGroup.group_name`). Gradients are those of the sum
of every rank's loss: the gradient of all_reduce is all_reduce, all_gather and reduce_scatter are each other's.

Expert parallelism: rank r of W owns the E / W consecutive experts from r * E / W on. Training dispatches with explicit
splits (one host synchronisation, or balanced ones in a dry run); decoding dispatches into static upper bounds.

Shapes: T tokens, D hidden size, E experts, e = E / W experts of a rank, k choices per token, S rows sent to this rank.
"""

from typing import Any

import torch
import torch.distributed._functional_collectives  # shape rules of _c10d_functional, for tracing the specifications
from torch import Tensor
from torch.distributed import distributed_c10d

from .moe import expert_count, unpermute
from .op import op

_functional = torch.ops._c10d_functional


def group_size(group: str) -> int:
    """Ranks of the group of this name."""
    return distributed_c10d._resolve_process_group(group).size()  # type: ignore[arg-type]


def group_rank(group: str) -> int:
    """This process's rank in the group of this name."""
    return distributed_c10d._resolve_process_group(group).rank()  # type: ignore[arg-type]


def _bytes(x: Tensor) -> Tensor:
    """FP8 as bytes: transports know no FP8."""
    return x.view(torch.uint8) if x.is_floating_point() and x.element_size() == 1 else x


def exchange(x: Tensor, out_splits: list[int], in_splits: list[int], group: str) -> Tensor:
    """`all_to_all` as its transport does it, FP8 included; for what other ops are made of."""
    sent = _functional.all_to_all_single(_bytes(x).contiguous(), out_splits, in_splits, group)
    received: Tensor = _functional.wait_tensor(sent).view(x.dtype)
    return received


# ---------------------------------------------------------------------------------------------------- collectives

SUMMED = 1e-6  # ranks are added in the transport's order


@op(tolerance=SUMMED, cost=lambda x, group: (x.numel(), 2 * x.nbytes), fake=lambda x, group: x.new_empty(x.shape))
def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum of every rank's x, on every rank; same shape and dtype."""
    return _functional.wait_tensor(_functional.all_reduce(x.contiguous(), "sum", group))


@all_reduce.backward(lambda ctx, inputs, output: setattr(ctx, "group", inputs[1]))
def _all_reduce_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return all_reduce(grad, ctx.group), None


def _all_gather_fake(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape[0] * group_size(group), *x.shape[1:])


@op(tolerance=0.0, cost=lambda x, group: (0, x.nbytes * group_size(group)), fake=_all_gather_fake)
def all_gather(x: Tensor, group: str) -> Tensor:
    """x [n, ...] of every rank, one after the other -> [W * n, ...]. Every rank must bring the same shape."""
    gathered = _functional.all_gather_into_tensor(_bytes(x).contiguous(), group_size(group), group)
    return _functional.wait_tensor(gathered).view(x.dtype)


def _reduce_scatter_fake(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape[0] // group_size(group), *x.shape[1:])


@op(tolerance=SUMMED, cost=lambda x, group: (x.numel(), x.nbytes), fake=_reduce_scatter_fake)
def reduce_scatter(x: Tensor, group: str) -> Tensor:
    """x [W * n, ...], summed over ranks; rank r keeps rows r * n to (r + 1) * n -> [n, ...]."""
    scattered = _functional.reduce_scatter_tensor(x.contiguous(), "sum", group_size(group), group)
    return _functional.wait_tensor(scattered)


@all_gather.backward(lambda ctx, inputs, output: setattr(ctx, "group", inputs[1]))
def _all_gather_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return reduce_scatter(grad, ctx.group), None


@reduce_scatter.backward(lambda ctx, inputs, output: setattr(ctx, "group", inputs[1]))
def _reduce_scatter_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return all_gather(grad, ctx.group), None


def _all_to_all_fake(x: Tensor, out_splits: list[int], in_splits: list[int], group: str) -> Tensor:
    return x.new_empty(sum(out_splits), *x.shape[1:])


@op(tolerance=0.0, cost=lambda x, *rest: (0, 2 * x.nbytes), fake=_all_to_all_fake)
def all_to_all(x: Tensor, out_splits: list[int], in_splits: list[int], group: str) -> Tensor:
    """Rank r gets the next in_splits[r] rows of x and sends us out_splits[r].

    x [sum(in_splits), ...] -> [sum(out_splits), ...], in the order of the senders' ranks.
    """
    return exchange(x, out_splits, in_splits, group)


def _all_to_all_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.splits = inputs[1:]


@all_to_all.backward(_all_to_all_setup)
def _all_to_all_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    out_splits, in_splits, group = ctx.splits
    return all_to_all(grad, in_splits, out_splits, group), None, None, None


# ---------------------------------------------------------------------------------------------------- experts, training


def local_experts(num_experts: int, group: str) -> int:
    """Experts of each rank; an error where they do not divide."""
    size = group_size(group)
    torch._check(num_experts % size == 0, lambda: f"{num_experts} experts do not divide over {size} ranks")
    return num_experts // size


def _counts_fake(idx: Tensor, num_experts: int, group: str) -> tuple[Tensor, Tensor]:
    size = group_size(group)
    sent = idx.new_empty(num_experts, dtype=torch.int32)
    return sent, idx.new_empty(size, local_experts(num_experts, group), dtype=torch.int32)


@op(
    shapes={"idx": "T k"},
    tolerance=0.0,
    cost=lambda idx, num_experts, group: (idx.numel(), idx.nbytes),
    fake=_counts_fake,
)
def ep_counts(idx: Tensor, num_experts: int, group: str) -> tuple[Tensor, Tensor]:
    """idx i32 [T, k], global experts -> sent i32 [E]: rows that this rank has for each expert; received i32 [W, e]:
    rows that each rank has for each expert of this one."""
    size, local = group_size(group), local_experts(num_experts, group)
    sent = expert_count.spec(idx, num_experts)
    return sent, exchange(sent, [local] * size, [local] * size, group).view(size, local)


def ep_splits(idx: Tensor, num_experts: int, group: str) -> tuple[list[int], list[int]]:
    """The real (in_splits, out_splits) of a dispatch; waits for the device. A dry run passes balanced ones instead."""
    sent, received = ep_counts(idx, num_experts, group)
    return sent.view(group_size(group), -1).sum(1).tolist(), received.sum(1).tolist()


def _dispatch_fake(
    x: Tensor, idx: Tensor, num_experts: int, in_splits: list[int], out_splits: list[int], group: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    rows = sum(out_splits)
    return x.new_empty(rows, x.shape[1]), idx.new_empty(rows, dtype=torch.int32), [torch.empty_like(idx)]


def _dispatch_cost(x: Tensor, idx: Tensor, *rest: Any) -> tuple[int, int]:
    return 0, 2 * idx.numel() * (x.shape[1] * x.element_size() + 4)


@op(shapes={"x": "T D", "idx": "T k"}, tolerance=0.0, cost=_dispatch_cost, fake=_dispatch_fake)
def ep_dispatch(
    x: Tensor, idx: Tensor, num_experts: int, in_splits: list[int], out_splits: list[int], group: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Send every token to the ranks that own its experts, once per choice.

    x [T, D], any dtype; idx i32 [T, k], global experts; in_splits, out_splits: rows to and from each rank (`ep_splits`)
    -> recv [S, D], S = sum(out_splits), by sending rank, then expert, then token; expert i32 [S]: local expert of each
       row; handle for `ep_combine` (here: the place i32 [T, k] of each row among those sent).
    Sorting the rows by expert (`permute`, k = 1) restores the token order of a single process.
    """
    local = local_experts(num_experts, group)
    flat = idx.reshape(-1)
    order = flat.long().argsort(stable=True)
    rows = _bytes(x).index_select(0, order // idx.shape[1]).view(x.dtype)
    expert = exchange(flat.int()[order] % local, out_splits, in_splits, group)
    place = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=idx.device))
    return exchange(rows, out_splits, in_splits, group), expert, [place.view(idx.shape).int()]


def _combine_fake(y: Tensor, handle: list[Tensor], in_splits: list[int], out_splits: list[int], group: str) -> Tensor:
    return y.new_empty(handle[0].numel(), y.shape[1])


def _combine_cost(y: Tensor, *rest: Any) -> tuple[int, int]:
    return 0, 2 * y.nbytes


@op(shapes={"y": "S D", "handle": ("T k",)}, tolerance=0.0, cost=_combine_cost, fake=_combine_fake)
def ep_combine(y: Tensor, handle: list[Tensor], in_splits: list[int], out_splits: list[int], group: str) -> Tensor:
    """Send the experts' answers back: y [S, D], rows as dispatched, with the dispatch's handle and splits
    -> [T * k, D]: row t * k + j answers choice j of token t."""
    returned = exchange(y, in_splits, out_splits, group)
    return _bytes(returned).index_select(0, handle[0].reshape(-1).long()).view(y.dtype)


def _dispatch_backward_fake(grad: Tensor, handle: list[Tensor], *rest: Any) -> Tensor:
    return grad.new_empty(handle[0].shape[0], grad.shape[1])


@op(shapes={"grad": "S D", "handle": ("T k",)}, tolerance=1e-6, cost=_combine_cost, fake=_dispatch_backward_fake)
def ep_dispatch_backward(
    grad: Tensor, handle: list[Tensor], in_splits: list[int], out_splits: list[int], group: str
) -> Tensor:
    """grad [S, D] of the received rows -> gradient of x [T, D]: a combine, summed over choices as `unpermute` does."""
    return unpermute.spec(exchange(grad, in_splits, out_splits, group), handle[0], None)


def _combine_backward_fake(
    grad: Tensor, handle: list[Tensor], in_splits: list[int], out_splits: list[int], group: str
) -> Tensor:
    return grad.new_empty(sum(out_splits), grad.shape[1])


@op(shapes={"handle": ("T k",), "grad": "T*k D"}, tolerance=0.0, cost=_combine_cost, fake=_combine_backward_fake)
def ep_combine_backward(
    grad: Tensor, handle: list[Tensor], in_splits: list[int], out_splits: list[int], group: str
) -> Tensor:
    """grad [T * k, D] -> gradient of y [S, D]: a dispatch of one row per choice."""
    rows = torch.empty_like(grad).index_copy(0, handle[0].reshape(-1).long(), grad)
    return exchange(rows, out_splits, in_splits, group)


def _dispatch_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    ctx.splits = inputs[3:]
    ctx.save_for_backward(*output[2])


@ep_dispatch.backward(_dispatch_setup)
def _dispatch_gradient(ctx: Any, grad: Tensor, *of_integers: Any) -> tuple[Tensor | None, ...]:
    return ep_dispatch_backward(grad, list(ctx.saved_tensors), *ctx.splits), *[None] * 5


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.splits = inputs[2:]
    ctx.save_for_backward(*inputs[1])


@ep_combine.backward(_combine_setup)
def _combine_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    handle = list(ctx.saved_tensors)
    return ep_combine_backward(grad, handle, *ctx.splits), [None] * len(handle), None, None, None


# ---------------------------------------------------------------------------------------------------- experts, decoding


def _dispatch_masked_fake(
    x: Tensor, idx: Tensor, num_experts: int, capacity: int, group: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    size, local = group_size(group), local_experts(num_experts, group)
    received = x.new_empty(local, size * capacity, x.shape[1])
    slots = idx.new_empty(num_experts * capacity, dtype=torch.int32)
    return received, idx.new_empty(local, dtype=torch.int32), [torch.empty_like(idx), slots]


@op(shapes={"x": "T D", "idx": "T k"}, tolerance=0.0, cost=_dispatch_cost, fake=_dispatch_masked_fake)
def ep_dispatch_masked(
    x: Tensor, idx: Tensor, num_experts: int, capacity: int, group: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Send tokens to their experts within static bounds: no host synchronisation, the same shapes in every step.

    x [T, D]; idx i32 [T, k], distinct global experts per token; capacity >= T, the same on every rank
    -> recv [e, W * capacity, D]: each local expert's rows from the front, by sending rank, then token; the rest is 0;
       counts i32 [e]: how many there are; handle for `ep_combine_masked` (here: where each row lies among the sent
       [T, k], and where each received row went [E * capacity], out of bounds for an empty one).
    """
    T, k = idx.shape
    torch._check(capacity >= T, lambda: "more tokens than the dispatch's capacity: raise it to the largest batch")
    size, local = group_size(group), local_experts(num_experts, group)
    flat = idx.reshape(-1).long()
    counts = expert_count.spec(idx, num_experts)
    order = flat.argsort(stable=True)
    sorted_experts = flat[order]
    first = counts.long().cumsum(0) - counts
    target = sorted_experts * capacity + torch.arange(T * k, device=idx.device) - first[sorted_experts]
    raw = _bytes(x)
    rows = raw.new_zeros(num_experts * capacity, x.shape[1]).index_copy(0, target, raw.index_select(0, order // k))
    place = torch.empty_like(target).scatter(0, order, target)

    equal = [local * capacity] * size
    received = exchange(rows, equal, equal, group)  # by (sending rank, local expert, slot)
    by_rank = exchange(counts, [local] * size, [local] * size, group).view(size, local).long()
    start = by_rank.cumsum(0) - by_rank + torch.arange(local, device=idx.device) * (size * capacity)
    slot = torch.arange(capacity, device=idx.device)
    valid = slot < by_rank[..., None]  # [W, e, capacity]
    bound = num_experts * capacity
    slots = torch.where(valid, start[..., None] + slot, torch.full_like(slot, bound)).reshape(-1)
    # One spare row takes what is not valid.
    compact = received.new_zeros(bound + 1, x.shape[1]).index_copy(0, slots, received)[:bound]
    compact = compact.clone().view(local, size * capacity, x.shape[1]).view(x.dtype)
    return compact, by_rank.sum(0).int(), [place.view(T, k).int(), slots.int()]


def _combine_masked_fake(y: Tensor, handle: list[Tensor], group: str) -> Tensor:
    return y.new_empty(handle[0].numel(), y.shape[2])


@op(shapes={"y": "e C D", "handle": ("T k", "e*C")}, tolerance=0.0, cost=_combine_cost, fake=_combine_masked_fake)
def ep_combine_masked(y: Tensor, handle: list[Tensor], group: str) -> Tensor:
    """Send back what `ep_dispatch_masked` brought: y [e, W * capacity, D], where rows beyond the counts may hold
    anything; its handle -> [T * k, D]: row t * k + j answers choice j of token t."""
    place, slots = handle
    size, flat = group_size(group), y.flatten(0, 1)
    rows = flat.index_select(0, slots.long().clamp(max=flat.shape[0] - 1))
    equal = [rows.shape[0] // size] * size
    return exchange(rows, equal, equal, group).index_select(0, place.reshape(-1).long())
