"""What decoding and prefill cost at least, from the shape of a model and the data sheet of a node.

A step reads weights or computes with them, whichever takes longer, and then does the same with latents. Not counted:
communication and launches (`Node.overhead` can stand for both), sampling, MTP modules, and work that is spread
unevenly.

Weights are read once per step. Of the routed experts, only those are that some token of the step has chosen: if choices
of k among E experts were independent and even, T tokens would touch E (1 - (1 - k / E)^T) of them on average.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from ..core.cache_size import cache_bytes_per_token
from ..core.config import ModelConfig
from ..parallel.mesh import Mesh
from ..parallel.share import RankBytes, Share
from .cost import CostModel
from .nodes import Node

Precision = Literal["fp8", "bf16"]
PAGE = 64  # tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` new tokens of a sequence behind `start` others. group: whose devices hold its latents."""

    start: int
    count: int
    group: int = 0


@dataclass(frozen=True)
class Bill:
    """Seconds of a chunk of a prompt in expanded form. expansion: of the latents before it, once more."""

    products: float
    attention: float
    expansion: float


@dataclass(frozen=True)
class Layout:
    """How a model lies on a node. held: bytes per device. group: devices that share out the heads of a sequence.
    groups: of these, each with sequences of its own. latents: the part of its group's latents that a device holds."""

    name: str
    held: RankBytes
    group: int
    groups: int = 1
    latents: float = 1.0


def mesh_layout(config: ModelConfig, tp: int, dp: int, weights: Precision) -> Layout:
    """As our engine spreads a model: routed experts over all devices, attention over tp of them, which hold the same
    latents. UserError where the model does not divide."""
    return Layout(f"tp {tp}, dp {dp}", held_by_rank(config, Mesh(tp, dp), weights), tp, dp)


def held_by_rank(config: ModelConfig, mesh: Mesh, weights: Precision) -> RankBytes:
    """`Share.bytes` without MTP modules, put together from few layers, as those of a kind are alike."""

    def held(dense: int, sparse: int) -> dict[str, int]:
        layers = {"num_hidden_layers": dense + sparse, "first_k_dense_replace": dense, "moe_layer_freq": 1}
        model = config.replace(num_nextn_predict_layers=0, **layers)
        return vars(Share(model, mesh).bytes(torch.bfloat16, weights == "fp8"))

    sparse = sum(config.is_moe_layer(index) for index in range(config.num_hidden_layers))
    dense = config.num_hidden_layers - sparse
    one, two = held(0, 1), held(0, 2)
    with_dense = held(1, 1) if dense else one
    sizes = {part: one[part] + (sparse - 1) * (two[part] - one[part]) for part in one}
    return RankBytes(**{part: size + dense * (with_dense[part] - one[part]) for part, size in sizes.items()})


def ideal_layout(config: ModelConfig, devices: int, weights: Precision) -> Layout:
    """Every tensor, and the latents of every sequence, in equal parts on all devices: a bound for any layout."""
    whole = mesh_layout(config, 1, 1, weights).held
    part = RankBytes(**{name: size // devices for name, size in vars(whole).items()})
    return Layout("all sharded", part, devices, 1, 1 / devices)


@dataclass(frozen=True)
class Roofline:
    """absorbed: most new tokens of a sequence that attend to the latents themselves; more expand them first. None takes
    what is cheaper."""

    config: ModelConfig
    node: Node
    layout: Layout
    weights: Precision = "fp8"
    cache: Precision = "bf16"
    absorbed: int | None = None

    # Memory -----------------------------------------------------------------------------------------------------------

    @cached_property
    def latent_bytes(self) -> int:
        """Of a token, over all layers."""
        size = cache_bytes_per_token(self.config)
        return size.latent_fp8 if self.cache == "fp8" else size.latent_bf16

    @property
    def free(self) -> float:
        """Bytes per device that are left for latents; negative where the model does not fit."""
        return self.node.device.memory - self.node.reserve - self.layout.held.total

    @property
    def blocks(self) -> int:
        """Pages of the cache of a group; 0 where the model does not fit."""
        return max(int(self.free // (PAGE * self.latent_bytes * self.layout.latents)), 0)

    def sequences(self, context: int) -> int:
        """Of `context` tokens each, as many as fit: whole ones in every group."""
        return self.layout.groups * (self.blocks // -(-context // PAGE))

    # Work per token ---------------------------------------------------------------------------------------------------

    @cached_property
    def _expert_layers(self) -> int:
        return sum(self.config.is_moe_layer(index) for index in range(self.config.num_hidden_layers))

    @cached_property
    def parameters(self) -> int:
        """Of the main model, all of them."""
        held = mesh_layout(self.config, 1, 1, "bf16").held
        biases = self._expert_layers * self.config.n_routed_experts * self.config.has_gate_bias  # in float32
        return held.total // 2 - biases

    @cached_property
    def active_parameters(self) -> int:
        """That take part in a token: all but the embedding and the routed experts that it is not sent to."""
        c = self.config
        idle = self._expert_layers * (c.n_routed_experts - c.num_experts_per_tok)
        embedding = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
        return self.parameters - idle * 3 * c.hidden_size * c.moe_intermediate_size - embedding

    def touched(self, tokens: int) -> float:
        """Routed experts of a layer that are read for so many tokens, on average."""
        experts = self.config.n_routed_experts
        return experts * (1 - (1 - self.config.num_experts_per_tok / experts) ** tokens)

    @cached_property
    def absorbed_flops(self) -> int:
        """Of attention in latent space: per token, token of its context, and all heads and layers."""
        c = self.config
        return 2 * c.num_attention_heads * (c.latent_dim + c.kv_lora_rank) * c.num_hidden_layers

    @cached_property
    def expanded_flops(self) -> int:
        """The same, of attention to keys and values."""
        c = self.config
        return 2 * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * c.num_hidden_layers

    @cached_property
    def expansion_flops(self) -> int:
        """To make keys and values of a token's latents, in all layers."""
        c = self.config
        width = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
        return 2 * c.kv_lora_rank * width * c.num_hidden_layers

    @cached_property
    def _size(self) -> int:
        """Bytes of a weight."""
        return 1 if self.weights == "fp8" else 2

    @cached_property
    def _common(self) -> int:
        """Bytes per device of what every token of its group passes through, and FP8 may hold."""
        held = self.layout.held
        return held.attention + held.dense + held.shared_experts

    @cached_property
    def _head(self) -> float:
        """Bytes per device."""
        return self.layout.held.embedding_and_head / (1 if self.config.tie_word_embeddings else 2)

    @cached_property
    def _products(self) -> tuple[float, float]:
        """Seconds per token of products, computing: of its group's devices, and of the routed experts on all."""
        c, rate = self.config, self.node.device.flops * self.node.products
        expert = c.num_experts_per_tok * 3 * c.hidden_size * c.moe_intermediate_size * self._expert_layers
        return 2 * self._common / self._size / rate, 2 * expert / self.node.count / rate

    @cached_property
    def _rates(self) -> tuple[float, float, float]:
        """Seconds per token of context: per token in latent space, per token in expanded form, and to expand it."""
        latent = self.node.device.flops * self.node.attention * self.layout.group
        expanded = self.node.device.flops * self.node.products * self.layout.group
        return self.absorbed_flops / latent, self.expanded_flops / expanded, self.expansion_flops / expanded

    @property
    def break_even(self) -> float:
        """New tokens of a sequence from which on it pays to expand all latents before them; it may never."""
        latent, expanded, expansion = self._rates
        return expansion / (latent - expanded) if latent > expanded else float("inf")

    # Time -------------------------------------------------------------------------------------------------------------

    def reading(self, tokens: int, context: int = 0) -> float:
        """Seconds that a step of so many tokens takes to read its weights, and latents of `context` tokens a group."""
        part = self.touched(tokens) / self.config.n_routed_experts
        held, latents = self.layout.held, context * self.latent_bytes * self.layout.latents
        size = self._common + held.rest + self._head + held.routed_experts * part + latents
        return size / self.node.device.bandwidth

    def attention(self, chunk: Chunk) -> float:
        """Seconds of the devices of its group."""
        context = chunk.start + chunk.count / 2
        latent, expanded, expansion = self._rates
        read = context * self.latent_bytes * self.layout.latents / self.node.device.bandwidth
        in_latents = max(chunk.count * context * latent, read)
        in_heads = max(chunk.count * context * expanded + chunk.start * expansion, read)
        if self.absorbed is None:
            return min(in_latents, in_heads)
        return in_latents if chunk.count <= self.absorbed else in_heads

    def step(self, chunks: Iterable[Chunk]) -> float:
        """Seconds of a step: the slowest group counts, as all wait for each other at the experts."""
        tokens, attention = [0] * self.layout.groups, [0.0] * self.layout.groups
        for chunk in chunks:
            tokens[chunk.group] += chunk.count
            attention[chunk.group] += self.attention(chunk)
        held, bandwidth, total = self.layout.held, self.node.device.bandwidth, sum(tokens)
        of_group, of_experts = self._products
        part = self.touched(total) / self.config.n_routed_experts
        common = max(self._common / bandwidth, max(tokens) * of_group)
        experts = max(held.routed_experts * part / bandwidth, total * of_experts)
        rest = (held.rest + self._head) / bandwidth
        return self.node.overhead + common + experts + rest + max(attention)

    def decode(self, sequences: int, context: int) -> float:
        """Seconds per output token: a step of so many sequences with `context` tokens each, evenly over the groups."""
        return self.step(Chunk(context - 1, 1, number % self.layout.groups) for number in range(sequences))

    def bill(self, start: int, count: int) -> Bill:
        """A chunk of one prompt that expands keys and values: computing alone."""
        _, expanded, expansion = self._rates
        return Bill(count * sum(self._products), count * (start + count / 2) * expanded, start * expansion)

    def prefill(self, length: int, chunk: int | None = None) -> float:
        """Seconds of one prompt with nobody else there, in chunks or at once."""
        chunk = chunk or length
        return sum(self.step([Chunk(start, min(chunk, length - start))]) for start in range(0, length, chunk))

    def cost_model(self, sequences: int, context: int) -> CostModel:
        """What the scheduler reckons with beside so many sequences that decode: `step` is never above its sum.

        Its form is linear, so its `context` is that of attention in latent space, which small chunks take far behind
        the start; large ones at the start may be cheaper. What decoding reads above that goes into `step`.
        """
        latent, expanded, _ = self._rates
        each = max(latent, expanded)
        read = self.latent_bytes * self.layout.latents / self.node.device.bandwidth
        residents = -(-sequences // self.layout.groups) * context
        whole = self.reading(2**31) + self.node.overhead
        return CostModel(whole + residents * max(read - each, 0.0), sum(self._products), each)
