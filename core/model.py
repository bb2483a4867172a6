"""DeepSeek-V3, on one page: embedding, blocks, norm, head, and the modules that predict further tokens.

The model knows nothing of devices or parallelism: it is built on ops, and can be built for any range of its layers, on
the meta device too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from ..ops.weight import Weight, linear
from .block import Block
from .cache import CacheStep
from .config import ModelConfig
from .linear import Embedding, Linear
from .mla import MLA
from .mtp import MTPModule
from .norm import RMSNorm
from .rope import rope_table
from .step import Routing, Step, packed


@dataclass
class ModelOutput:
    """logits [..., V], or None where none were asked for; hidden [T, D], behind the final norm; the pass itself."""

    logits: Tensor | None
    hidden: Tensor
    step: Step


class Backbone(nn.Module):
    """The part that checkpoints call `model`: embedding, layers by number (main ones, then MTP modules), final norm."""

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        ends: tuple[bool, bool],
        mtp: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        first, last = ends
        if first or mtp:
            self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, device, dtype)
        self.layers = nn.ModuleDict({str(i): Block(config, i, device, dtype) for i in layers})
        if mtp:
            for i in range(config.num_hidden_layers, config.num_layers_with_mtp):
                self.layers[str(i)] = MTPModule(config, i, device, dtype)
        if last:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)


class DeepseekV3(nn.Module):
    """A model of the family, or the part of one that a pipeline stage holds.

    layers: which main layers to build; all by default. embed, head: with the embedding, with the final norm and head.
    mtp: with the MTP modules; by default where the head is.
    device, dtype: of the parameters. Computation follows the embedding's dtype; the gates compute in float32 always.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        layers: range | None = None,
        embed: bool = True,
        head: bool = True,
        mtp: bool | None = None,
    ):
        super().__init__()
        self.config = config
        self.layer_range = range(config.num_hidden_layers) if layers is None else layers
        mtp = head if mtp is None else mtp
        self.model = Backbone(config, self.layer_range, (embed, head), mtp, device, dtype)
        if head and not (config.tie_word_embeddings and embed):
            self.lm_head = Linear((config.vocab_size, config.hidden_size), device, dtype)
        self.recompute = False  # run each block again in backward instead of keeping its activations
        self._rope_table: Tensor | None = None

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        fp8: str = "keep",
    ) -> "DeepseekV3":
        """Load a directory in the Hugging Face format.

        dtype: of the float weights; None keeps the checkpoint's.
        fp8: "keep" FP8 weights in memory, or "dequantize" them.
        """
        from .loading import load_pretrained

        return load_pretrained(cls, Path(directory), backend, dtype, device, fp8)

    # The parts, for pipeline stages and for training.

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens i64 [T] -> [T, D]."""
        return self.model.embed_tokens(tokens)

    def block(self, index: int) -> Block:
        block = self.model.layers[str(index)]
        assert isinstance(block, Block)
        return block

    def blocks(self, x: Tensor, step: Step) -> Tensor:
        """All main layers that this model holds, in order."""
        for i in self.layer_range:
            x = self._run(self.block(i), x, step)
        return x

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the output matrix, which may be the embedding's."""
        return self.lm_head.weight if hasattr(self, "lm_head") else self.model.embed_tokens.weight

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [T, D], behind the norm -> logits [T, V]."""
        if hasattr(self, "lm_head"):
            return self.lm_head(hidden)
        return linear(hidden, Weight(self.model.embed_tokens.weight.to(hidden.dtype)))

    def mtp(self, depth: int, hidden: Tensor, next_tokens: Tensor, step: Step) -> Tensor:
        """Depth 0 predicts one token beyond the main model.

        hidden [T, D] of tokens i, next_tokens [T] = tokens i + depth + 1 -> hidden state [T, D] for the head, which
        then predicts token i + depth + 2.
        """
        module = self.block(self.config.num_hidden_layers + depth)
        assert isinstance(module, MTPModule)
        return self._run(module.predict, hidden, self.embed(next_tokens), step)

    def _run(self, part: Callable[..., Tensor], *inputs: Tensor | Step) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)

    # A whole pass.

    def step(
        self,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_len: int,
        cache: CacheStep | None = None,
        routing: Routing | None = None,
        limit: int | None = None,
    ) -> Step:
        """Describe a pass over packed tokens; `limit` is a bound of the positions (the context length by default)."""
        return Step(positions, cu_seqlens, max_len, self.rope_table(positions.device, limit), cache, routing)

    def rope_table(self, device: torch.device, limit: int | None = None) -> Tensor:
        """f32 [P, r] with P >= limit; grown by doubling, as most passes are far shorter than the context."""
        context = self.config.max_position_embeddings
        wanted = context if limit is None else limit
        if wanted > context:
            raise UserError(f"{wanted} tokens exceed the model's context of {context} tokens; shorten the input")
        table = self._rope_table
        if table is None or table.shape[0] < wanted or table.device != device:
            doubled = 1024 if table is None else 2 * table.shape[0]
            length = min(max(wanted, doubled), context)
            if torch.compiler.is_compiling():
                return rope_table(self.config, length, device)
            with torch.inference_mode(False):  # a table made while generating must do for training, too
                table = rope_table(self.config, length, device)
            if not isinstance(table, FakeTensor):
                self._rope_table = table
        return table

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: CacheStep | None = None,
        routing: Routing | None = None,
        positions: Tensor | None = None,
        logits: str = "all",
    ) -> ModelOutput:
        """One pass.

        input_ids: i64 [B, S], or packed [T] with cu_seqlens i32 [B+1].
        positions: i64, shaped like input_ids; by default each sequence counts from 0, which is wrong where the cache
            holds tokens already.
        logits: "all", "last" (of every sequence; [B, V]) or "none".
        Returns logits [B, S, V], or [T, V] for packed input.
        """
        limit = None  # of the positions, where it is known without reading the tensor
        if positions is None or cache is not None:
            limit = 0 if cache is None else cache.longest
        if input_ids.dim() == 2:
            batch, length = input_ids.shape
            cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=input_ids.device) * length
            max_len = length
            if positions is None:
                positions = torch.arange(length, device=input_ids.device).expand(batch, length)
        else:
            if cu_seqlens is None:
                cu_seqlens = torch.tensor([0, len(input_ids)], dtype=torch.int32, device=input_ids.device)
            lengths = cu_seqlens.diff().tolist()
            max_len = max(lengths)
            if positions is None:
                positions = packed(lengths, device=input_ids.device)[0]
        limit = None if limit is None else max(limit, max_len)
        if positions.shape != input_ids.shape:
            raise UserError(f"positions of shape {list(positions.shape)} for input_ids of {list(input_ids.shape)}")
        if cache is not None and cache.batch != cu_seqlens.shape[0] - 1:
            raise UserError(f"the cache is bound to {cache.batch} sequences, input_ids are {cu_seqlens.shape[0] - 1}")
        step = self.step(positions.reshape(-1), cu_seqlens, max_len, cache, routing, limit)
        hidden = self.model.norm(self.blocks(self.embed(input_ids.reshape(-1)), step))
        if logits == "none":
            return ModelOutput(None, hidden, step)
        if logits == "last":
            return ModelOutput(self.head(hidden[cu_seqlens[1:].long() - 1]), hidden, step)
        return ModelOutput(self.head(hidden).view(*input_ids.shape, -1), hidden, step)

    def num_parameters(self) -> int:
        """Learned numbers: parameters, and the balancing biases, which training moves though no gradient does."""
        biases = sum(
            buffer.numel() for name, buffer in self.named_buffers() if name.endswith("e_score_correction_bias")
        )
        return sum(parameter.numel() for parameter in self.parameters()) + biases

    def init_weights(self, std: float | None = None, embedding_std: float | None = None, seed: int = 0) -> None:
        """Normal weights, norms 1, balancing biases 0 (report, section 4.2: std 0.006 for every learnable matrix)."""
        std = self.config.initializer_range if std is None else std
        generator = torch.Generator(device=next(self.parameters()).device).manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    chosen = embedding_std if embedding_std is not None and "embed_tokens" in name else std
                    parameter.normal_(0.0, chosen, generator=generator)
            for name, buffer in self.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.zero_()

    def pack(self) -> None:
        """Bring all weights into the layouts of the active backend's kernels; for inference, after loading."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()

    def refresh(self) -> None:
        """Say that the weights were written: what was derived from them (packed, absorbed) is made anew.

        Writes that PyTorch counts are noticed without it; those through `.data` or to inference tensors are not.
        """
        for module in self.modules():
            if isinstance(module, (Linear, MLA)):
                module.refresh()

    def addresses(self) -> list[int]:
        """Where a pass reads weights and what was derived from them: a step that was captured reads there again."""
        derived = [kept for module in self.modules() if isinstance(module, (Linear, MLA)) for kept in module.derived()]
        return [tensor.data_ptr() for tensor in (*self.parameters(), *self.buffers(), *derived)]
