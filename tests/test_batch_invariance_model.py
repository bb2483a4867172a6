"""On backend cpu-invariant a model's logits for a token do not depend on how its sequence is cut, nor on the others."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from parity import configs, random_model
from tiny_model import CONFIG
from torch import Tensor

from dsv3.backends import use_backend
from dsv3.core.cache import PagedCache
from dsv3.core.linear import Linear
from dsv3.core.model import DeepseekV3
from dsv3.ops.cache_layout import fused_layout
from dsv3.ops.formats import E4M3
from dsv3.ops.fp8 import quantize_blocks

pytestmark = pytest.mark.slow

NAME = "cpu-invariant"
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # a failure is not made smaller: that takes minutes
QUICK = settings(
    deadline=None, max_examples=6, suppress_health_check=list(HealthCheck), derandomize=True, phases=PHASES
)
CACHES = st.sampled_from([torch.float32, torch.bfloat16, E4M3])


@pytest.fixture(autouse=True)
def invariant() -> Iterator[None]:
    with use_backend(NAME), torch.inference_mode():
        yield


class Feeder:
    """Feeds sequences to a model over a paged cache, every new token in absorbed form and as a sequence of its own."""

    def __init__(self, model: DeepseekV3, dtype: torch.dtype, seed: int):
        self.model, config = model, model.config
        self.cache = PagedCache(config, 64, dtype, layout=fused_layout(config, dtype, page_size=16))
        self.free = torch.randperm(64, generator=torch.Generator().manual_seed(seed)).tolist()
        self.pages: dict[int, list[int]] = {}

    def __call__(self, chunks: list[tuple[int, Tensor, int]], S: int = 1) -> list[Tensor]:
        """(sequence, all its tokens and one more, tokens known) and how many come -> per chunk what each token gave."""
        pages, known, fresh, following, counts = [], [], [], [], []
        for name, tokens, start, count in chunks:
            owned = self.pages.setdefault(name, [])
            while len(owned) * 16 < start + count:
                owned.append(self.free.pop())
            for place in range(start, start + count, S):
                pages.append(owned)
                known.append(place)
                fresh.append(tokens[place : place + S])
                following.append(tokens[place + 1 : place + S + 1])
            counts.append(count)
        places = torch.cat([torch.arange(place, place + S) for place in known])
        ends = torch.arange(len(known) + 1, dtype=torch.int32) * S
        step = self.cache.step(pages, known, [S] * len(known), absorbed=True)
        out = self.model(torch.cat(fresh), ends, step, positions=places)
        assert out.logits is not None
        results = [out.logits]
        hidden = out.hidden
        for depth in range(self.model.config.num_nextn_predict_layers):
            hidden = self.model.mtp(depth, hidden, torch.cat(following), out.step)
            results.append(self.model.head(hidden))
        return list(torch.cat(results, -1).split(counts))


def token_by_token(model: DeepseekV3, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    feed = Feeder(model, dtype, seed=0)
    return torch.cat([feed([(0, tokens, place, 1)])[0] for place in range(len(tokens) - 1)])


def in_company(data: st.DataObject, model: DeepseekV3, tokens: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """All sequences at once, each in chunks of its own, in steps in which not all take part."""
    feed, done = Feeder(model, dtype, seed=1), [0] * len(tokens)
    results: list[list[Tensor]] = [[] for _ in tokens]
    while any(place < len(own) - 1 for place, own in zip(done, tokens, strict=True)):
        chunks = []
        for name, own in enumerate(tokens):
            count = min(data.draw(st.sampled_from([0, 1, 1, 3, 20])), len(own) - 1 - done[name])
            if count:
                chunks.append((name, own, done[name], count))
        if chunks:
            for (name, _, _, count), result in zip(chunks, feed(chunks), strict=True):
                done[name] += count
                results[name].append(result)
    return [torch.cat(parts) for parts in results]


def to_fp8(model: DeepseekV3) -> None:
    for module in model.model.layers.modules():
        if isinstance(module, Linear):
            module.load_fp8(*quantize_blocks(module.weight.detach()))


def sequences(lengths: list[int], vocabulary: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (length,), generator=generator) for length in lengths]


@pytest.mark.slow
@QUICK
@given(data=st.data(), weights=st.sampled_from(["float32", "bfloat16", "fp8"]), stored=CACHES, mtp=st.integers(0, 1))
def test_logits_of_a_token_are_the_same_alone_in_chunks_and_in_company(data, weights, stored, mtp):
    model = random_model(data.draw(configs(mtp=mtp)), 0)
    if weights == "bfloat16":
        model = model.bfloat16()
    elif weights == "fp8":
        to_fp8(model)
    tokens = sequences([9, 30, 21], model.config.vocab_size)
    for one, other in zip(in_company(data, model, tokens, stored), tokens, strict=True):
        assert torch.equal(one, token_by_token(model, other, stored))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drafted_tokens_are_verified_with_the_numbers_of_plain_decoding(dtype):
    """Three at a time as one sequence of three new tokens, beside one at a time."""
    model = random_model(CONFIG, 0).to(dtype)
    tokens = sequences([31], CONFIG.vocab_size)[0]
    feed = Feeder(model, dtype, seed=3)
    drafted = torch.cat([feed([(0, tokens, place, 3)], S=3)[0] for place in range(0, 30, 3)])
    assert torch.equal(drafted, token_by_token(model, tokens, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_backend_is_not_invariant(dtype):
    """Else the tests above would show nothing."""
    model = random_model(CONFIG.replace(hidden_size=64, intermediate_size=96), 0).to(dtype)
    tokens = sequences([40] * 8, CONFIG.vocab_size)

    def all_at_once() -> Tensor:
        feed = Feeder(model, dtype, seed=1)
        return feed([(name, own, 0, 39) for name, own in enumerate(tokens)])[0]

    assert torch.equal(all_at_once(), token_by_token(model, tokens[0], dtype))
    with use_backend("cpu"):
        assert not torch.equal(all_at_once(), token_by_token(model, tokens[0], dtype))
