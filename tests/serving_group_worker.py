"""What the four processes of test_serving_group.py run. A module of its own: children import it by name."""

from collections.abc import Callable

import torch.distributed as dist
from parity import random_model
from spreading import V3
from two_processes import leave, run_checks

import dsv3.backends.cpu  # noqa: F401  (its kernels are what runs)
from dsv3.core.generate import SamplingParams, SimpleRollout
from dsv3.parallel.channel import Channel
from dsv3.parallel.inference import spread
from dsv3.parallel.mesh import Mesh
from dsv3.serving.engine import Engine, EngineSettings
from dsv3.serving.group import GroupRunner, Member, follow
from dsv3.serving.messages import Add
from dsv3.serving.runner import RunnerSettings

WORLD = 4
CHECKS: dict[str, Callable[[int, str], None]] = {}


def check(function: Callable[[int, str], None]) -> Callable[[int, str], None]:
    CHECKS[function.__name__] = function
    return function


def requests() -> list[tuple[list[int], SamplingParams]]:
    V = V3.vocab_size
    prompts = [[3], [5, 7, 9] * 9, list(range(1, 30)), [i * i % V for i in range(70)], [3], [4, 4]]
    return [
        (prompt, SamplingParams(temperature=0.9, seed=i, max_tokens=4 + 3 * i, ignore_eos=True, top_logprobs=i % 3))
        for i, prompt in enumerate(prompts)
    ]


def serve(tp: int, dp: int, speculative: int) -> None:
    """All requests through an engine over the mesh; every text is what the whole model makes of it."""
    mesh, channel = Mesh.over_world(tp, dp), Channel()
    model = spread(random_model(V3, 0), mesh)
    member = Member(model, mesh, RunnerSettings(12, 8, None, speculative), V3)
    if mesh.rank:
        follow(member, channel)
        return
    runner = GroupRunner(member, channel)
    engine = Engine(runner, EngineSettings(V3.max_position_embeddings, V3.vocab_size, 12 * runner.page_size))
    asked = requests()
    got: dict[int, list[int]] = {i: [] for i in range(len(asked))}
    for round in range(2):  # one request alone at first: the other groups have nothing to do
        for i, (prompt, params) in enumerate(asked[:1] if round == 0 else asked[1:], round):
            engine.add(Add(i, prompt, params))
        while not engine.idle:
            for output in engine.step():
                got[output.id] += output.tokens
                assert len(output.top) == (len(output.tokens) if output.id % 3 else 0)
    runner.close()
    whole = SimpleRollout(random_model(V3, 0))
    for i, (prompt, params) in enumerate(asked):
        plain = SamplingParams(temperature=0.9, seed=i, max_tokens=params.max_tokens, ignore_eos=True)
        assert got[i] == whole.generate([prompt], plain)[0].token_ids, i
    assert all(pool.available == pool.num_blocks for pool in engine.scheduler.pools)


@check
def tensor_parallel_texts_are_those_of_one_process(rank: int, group: str) -> None:
    serve(4, 1, 1)


@check
def groups_with_requests_of_their_own_give_the_texts_of_one_process(rank: int, group: str) -> None:
    serve(2, 2, 2)


@check
def four_groups_share_experts_only(rank: int, group: str) -> None:
    serve(1, 4, 0)


def run(rank: int, folder: str) -> None:
    leave(run_checks(rank, folder, CHECKS, WORLD), rank, folder)
    assert not dist.is_initialized()
