"""What the two processes of test_expert_parallel.py run: the checks of collectives_worker.py on the Triton kernels,
interpreted, and DeepEP's adapter on a stand-in. A module of its own: children import it by name."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import collectives_worker
import pytest
import stand_ins
import torch
from collectives_worker import DIM, EXPERTS, TOKENS, routed
from stand_ins import deep_ep as library
from two_processes import leave, run_checks

from dsv3.backends import discover
from dsv3.backends.cuda import deep_ep
from dsv3.backends.triton import expert_parallel
from dsv3.ops import collectives
from dsv3.ops.op import OPS, set_backend

OF_COLLECTIVES = (
    "counts_say_what_will_be_sent_and_received",
    "expert_parallel_layer_equals_one_process_bit_for_bit",
    "dispatch_carries_fp8_and_its_scales",
    "masked_dispatch_brings_the_same_rows_as_dispatch",
    "a_rank_without_tokens_takes_part",
    "more_tokens_than_capacity_is_an_error",
)
CHECKS: dict[str, Callable[[int, str], None]] = {name: collectives_worker.CHECKS[name] for name in OF_COLLECTIVES}


def check(function: Callable[[int, str], None]) -> Callable[[int, str], None]:
    CHECKS[function.__name__] = function
    return function


def same(one, other) -> None:
    assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)) and one.dtype == other.dtype
    assert one.is_contiguous()


def masked_ops_do_as_specified(rank: int, group: str, D: int = DIM, dtype=torch.float32) -> None:
    for fewer in (0, 5, TOKENS):
        x, idx, _ = routed(rank)
        tokens = TOKENS - fewer * rank  # ranks need not have equally many
        x, idx = torch.randn(tokens, D).to(dtype), idx[:tokens]
        args = x, idx, EXPERTS, TOKENS + 2, group
        want, got = collectives.ep_dispatch_masked.spec(*args), collectives.ep_dispatch_masked(*args)
        for one, other in zip((*got[:2], *got[2][:2]), (*want[:2], *want[2]), strict=True):
            same(one, other)
        used = torch.arange(want[0].shape[1]) < want[1][:, None]
        y = torch.randn(want[0].shape).to(dtype).masked_fill(~used[..., None], float("nan"))
        answers = collectives.ep_combine_masked(y, got[2], group)
        same(answers, collectives.ep_combine_masked.spec(y, want[2], group))


@check
def masked_ops_give_what_their_specifications_give(rank: int, group: str) -> None:
    for D, dtype in ((DIM, torch.float32), (5, torch.bfloat16), (3, torch.float32)):
        masked_ops_do_as_specified(rank, group, D, dtype)


@check
def masked_dispatch_of_many_pairs_sorts_first(rank: int, group: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_parallel, "FEW_PAIRS", 0)
        masked_ops_do_as_specified(rank, group)


@check
def training_ops_give_what_their_specifications_give(rank: int, group: str) -> None:
    x, idx, _ = routed(rank)
    splits = collectives.ep_splits(idx, EXPERTS, group)
    args = x, idx, EXPERTS, *splits, group
    (rows, expert, handle), want = collectives.ep_dispatch(*args), collectives.ep_dispatch.spec(*args)
    for one, other in zip((rows, expert, *handle), (*want[:2], *want[2]), strict=True):
        same(one, other)
    for op in (collectives.ep_combine, collectives.ep_dispatch_backward):
        same(op(rows, handle, *splits, group), op.spec(rows, handle, *splits, group))
    grad = torch.randn(idx.numel(), DIM)
    backward = collectives.ep_combine_backward
    same(backward(grad, handle, *splits, group), backward.spec(grad, handle, *splits, group))


@contextmanager
def deep_ep_is_here():
    """The library's stand-in, for small rows too; the adapter's kernels taken as available."""
    with pytest.MonkeyPatch.context() as patch:
        stand_ins.install(patch, deep_ep=library)
        patch.setattr(library.Buffer, "hidden", (DIM, 2048))
        patch.setattr(library, "made", [])
        patch.setattr(deep_ep, "HIDDEN", (DIM, 2048))
        patch.setattr(deep_ep, "_buffers", {})
        for name in ("ep_dispatch_masked", "ep_combine_masked"):
            kernels = OPS[name].kernels["cuda"]
            usable = [
                replace(kernel, available=lambda: True) if kernel.provider == "deep_ep" else kernel
                for kernel in kernels
            ]
            patch.setitem(OPS[name].kernels, "cuda", usable)
        yield


@check
def deep_ep_gives_what_the_specifications_give(rank: int, group: str) -> None:
    with deep_ep_is_here():
        masked_ops_do_as_specified(rank, group, dtype=torch.bfloat16)
        (buffer,) = library.made
        assert buffer.next == 0 and not buffer.destroyed  # every dispatch had its combine
        assert deep_ep._buffers[group].open == 0
        x, idx, _ = routed(rank)
        _, _, handle = collectives.ep_dispatch_masked(x.bfloat16(), idx, EXPERTS, 3 * TOKENS, group)
        assert len(handle) == 4 and len(library.made) == 2 and buffer.destroyed  # it needed a larger one


def run(rank: int, folder: str) -> None:
    discover()["cuda"].load()
    set_backend("cuda")
    leave(run_checks(rank, folder, CHECKS), rank, folder)
