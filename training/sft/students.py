"""Who learns: a model of the DeepSeek-V3 family here, others through transformers, behind one small interface."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...core.checkpoint import save_pretrained
from ...core.config import MODEL_TYPES, ModelConfig
from ...core.encoding import detect_format, stop_token
from ...core.encoding_deepseek import STYLES
from ...core.model import DeepseekV3
from ...core.step import Routing
from ...core.tokenizer import Tokenizer
from ...errors import UserError
from ...ops.loss import IGNORE, token_logp
from ..chat_data import ChatRow, Example, encode_example
from ..data.transforms import tokenizer_fingerprint
from ..flops import flops_per_token
from ..lora import attach, base_digest, save_adapter
from .config import SftConfig
from .packing import Packed
from .samples import Encoder


@dataclass
class Losses:
    """total: what to differentiate. parts: what it is made of, before weights, detached; counts: `Routing.counts`."""

    total: Tensor
    parts: dict[str, Tensor]
    counts: dict[int, Tensor]


class Student(Protocol):
    """A model that learns. module: it; base: digest of what a checkpoint leaves out and a run that goes on must find as
    it was, or ""."""

    module: Any
    base: str

    def losses(self, batch: Packed, share: float) -> Losses:
        """Of a part of the global batch, `share` of its samples: `batch.weights` make a sum of a mean."""

    def logp(self, batch: Packed) -> Tensor:
        """log p of the learnt tokens, f32 [S]."""

    def flops_per_token(self, length: int) -> int:
        """Forward and backward of a token in a sample of this length."""

    def save(self, target: Path) -> None:
        """Write it in the Hugging Face format."""

    def advice(self, target: Path) -> str:
        """How to use what `save` wrote; see TrainingRun."""


def open_encoder(config: SftConfig) -> Encoder:
    """What turns conversations into tokens for the model that `config` names; before the model itself is read."""
    if config.fresh.wanted == bool(config.model):
        raise UserError("name one thing to start from: model, a directory, or [fresh], a shape with random weights")
    if config.fresh.wanted and not config.tokenizer:
        raise UserError("tokenizer is not set: a fresh model needs a directory with a tokenizer.json")
    if config.fresh.wanted and config.lora.rank:
        raise UserError("lora.rank adapts a model that is there: use it with model, or train a fresh one whole")
    if config.model and config.tokenizer:
        raise UserError(f"tokenizer is for fresh models only: {config.model} has its own, leave it out")
    if config.fresh.wanted or is_ours(config.model):
        encoder: Encoder = ChatEncoder(config)
    else:
        from .transformers_student import TemplateEncoder

        encoder = TemplateEncoder(config)
    if config.data.seq_len > encoder.context:
        raise UserError(f"data.seq_len is {config.data.seq_len}, the model's context {encoder.context}: lower it")
    return encoder


def open_student(config: SftConfig, encoder: Encoder, device: torch.device) -> Student:
    """The model that `config` names, ready to train; the same on every process."""
    if isinstance(encoder, ChatEncoder):
        return DeepseekStudent(config, encoder, device)
    from .transformers_student import TemplateEncoder, TransformersStudent

    assert isinstance(encoder, TemplateEncoder)
    return TransformersStudent(config, encoder, device)


def dtype_of(config: SftConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def is_ours(directory: str | Path) -> bool:
    """Does a directory hold a model of the family? UserError where it holds none at all."""
    file = Path(directory) / "config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type", "deepseek_v3")
    except (OSError, ValueError, AttributeError):
        raise UserError(f"model {directory}: no readable config.json there; give a model's directory") from None
    return kind in MODEL_TYPES


class ChatEncoder:
    """The chat formats of the family. shape: of the model, ready for the format."""

    def __init__(self, config: SftConfig):
        self.tokenizer = tokenizer = Tokenizer.load(config.model or config.tokenizer)
        self.thinking_in_loss = config.data.thinking_in_loss
        own = detect_format(tokenizer)
        self.format: str = own if config.data.format == "auto" else config.data.format
        # The saved tokenizer's template is that of the format, so that others write prompts as they were trained on.
        self.template = self.format if self.format != own and self.format in STYLES else None
        self.shape = self._shape(config)
        self.context = self.shape.max_position_embeddings
        parts = [tokenizer_fingerprint(tokenizer), self.format, self.thinking_in_loss]
        self.fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _shape(self, config: SftConfig) -> ModelConfig:
        """Its end of a turn ends generation, too: a base model's configuration need not name it."""
        shape = ModelConfig.from_pretrained(config.model) if config.model else config.fresh.resolve()
        if self.tokenizer.vocab_size > shape.vocab_size:
            raise UserError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model a vocabulary of {shape.vocab_size}: "
                "they do not belong together"
            )
        stop = self.tokenizer.special_id(stop_token(self.format))
        if not config.model:
            return shape.replace(bos_token_id=self.tokenizer.bos_id, eos_token_id=stop)
        known = shape.eos_token_ids
        return shape if stop in known else shape.replace(eos_token_id=[*known, stop])

    def encode(self, row: ChatRow) -> list[Example]:
        return encode_example(row, self.tokenizer, self.format, self.thinking_in_loss)

    def save_tokenizer(self, directory: Path) -> None:
        self.tokenizer.save(directory, self.template)


class DeepseekStudent:
    """A model of the family: loaded or fresh, trained as a whole or through adapters."""

    def __init__(self, config: SftConfig, encoder: ChatEncoder, device: torch.device):
        self.config, self.encoder, self.base = config, encoder, ""
        model = _fresh(config, encoder, device) if config.fresh.wanted else _loaded(config, encoder, device)
        self.module = model
        model.recompute = config.recompute == "full"
        model.train()
        if config.lora.rank:
            attach(model, config.lora, dtype_of(config), config.seed)
            self.base = base_digest(config.model)
        self.mtp_depths = model.config.num_nextn_predict_layers if config.mtp_weight else 0
        if not self.mtp_depths:  # their gradient would be 0, and weight decay move them all the same
            for layer in range(model.config.num_hidden_layers, model.config.num_layers_with_mtp):
                model.block(layer).requires_grad_(False)

    def losses(self, batch: Packed, share: float) -> Losses:
        config = self.config
        routing = Routing(balance_sequences=batch.cu_seqlens if config.balance.alpha else None)
        hidden = self._hidden(batch, routing)
        main = -(self._logp(hidden[batch.scored], batch.targets) * batch.weights).sum()
        parts, total = {"loss": main.detach()}, main
        if self.mtp_depths:
            mtp = self._mtp(hidden, batch)
            parts["mtp_loss"], total = mtp.detach(), total + config.mtp_weight * mtp
        if config.balance.alpha:
            balance = sum(routing.balance.values(), torch.zeros_like(main)) * share
            parts["balance_loss"], total = balance.detach(), total + config.balance.alpha * balance
        return Losses(total, parts, routing.counts)

    def logp(self, batch: Packed) -> Tensor:
        return self._logp(self._hidden(batch, None)[batch.scored], batch.targets)

    def _hidden(self, batch: Packed, routing: Routing | None) -> Tensor:
        """[T, D], behind the final norm."""
        model = self.module
        step = model.step(batch.positions, batch.cu_seqlens, batch.max_len, routing=routing, limit=batch.max_len)
        return model.model.norm(model.blocks(model.embed(batch.tokens), step))

    def _logp(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return token_logp(hidden, self.module.head_weight.to(hidden.dtype), targets)

    def _mtp(self, hidden: Tensor, batch: Packed) -> Tensor:
        """Mean over the depths of the MTP modules' losses. Depth k predicts, from token i, token i + k + 2 where that
        is learnt; what crosses into another sample is not."""
        model, count = self.module, batch.tokens.shape[0]
        step = model.step(batch.positions, batch.cu_seqlens, batch.max_len, limit=batch.max_len)
        targets = torch.full_like(batch.tokens, IGNORE).index_copy(0, batch.scored, batch.targets)
        weights = batch.weights.new_zeros(count).index_copy(0, batch.scored, batch.weights)
        places = torch.arange(count, device=batch.tokens.device)
        ends = torch.searchsorted(batch.cu_seqlens.to(places.dtype), places, right=True)
        left = batch.cu_seqlens.to(places.dtype)[ends] - places  # inputs of the sample from this one on
        loss = batch.weights.new_zeros(())
        for depth in range(self.mtp_depths):
            shift = depth + 1
            hidden = model.mtp(depth, hidden, batch.tokens.roll(-shift), step)
            later = torch.where(left > shift, targets.roll(-shift), IGNORE)
            scored = (later != IGNORE).nonzero()[:, 0]
            logp = self._logp(hidden[scored], later[scored])
            loss = loss - (logp * weights.roll(-shift)[scored]).sum() / self.mtp_depths
        return loss

    def flops_per_token(self, length: int) -> int:
        whole = flops_per_token(self.module.config, length, mtp=bool(self.mtp_depths))
        return whole * 2 // 3 if self.config.lora.rank else whole  # a frozen weight has no gradient of its own

    def save(self, target: Path) -> None:
        """The finished model. Of adapters: merged, and the adapters beside it in `adapter`; or they alone."""
        lora, config = self.config.lora, self.module.config
        if lora.rank:
            alone = lora.merge == "none"
            save_adapter(
                self.module, target if alone else target.with_name(target.name.replace("model", "adapter")),
                self.config.model,
                self.encoder.save_tokenizer if alone else None,
            )  # fmt: skip
            if alone:
                return
        dtype = torch.bfloat16 if lora.rank and lora.merge == "bf16" else None
        save_pretrained(self.module, config, target, dtype=dtype, also=self.encoder.save_tokenizer)

    def advice(self, target: Path) -> str:
        lora = self.config.lora
        if lora.rank and lora.merge == "none":
            return f": a PEFT adapter of {self.config.model}"
        return f"; try: dsv3 chat {target}"


def _loaded(config: SftConfig, encoder: ChatEncoder, device: torch.device) -> DeepseekV3:
    keep = config.lora.rank > 0 and config.lora.fp8 == "keep"
    fp8 = "keep" if keep else "dequantize"
    model = DeepseekV3.from_pretrained(config.model, dtype=dtype_of(config), device=device, fp8=fp8)
    model.config = encoder.shape
    return model


def _fresh(config: SftConfig, encoder: ChatEncoder, device: torch.device) -> DeepseekV3:
    model = DeepseekV3(encoder.shape, device=device, dtype=dtype_of(config))
    model.init_weights(config.fresh.init_std, config.fresh.embedding_std, config.seed)
    return model


def trained(module: nn.Module) -> int:
    """Numbers that training moves."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
