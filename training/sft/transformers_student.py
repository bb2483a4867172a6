"""Dense students through transformers (Qwen, Llama): DeepSeek-R1's distilled models are such.

Samples are packed as everywhere: end to end, with an attention that takes each sample for itself, so nothing is padded.
It is registered with transformers under a name of its own and is made of PyTorch's kernel, on any device.
"""

import hashlib
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ...core.checkpoint_write import OWNED
from ...core.files import atomic_directory
from ...core.records import library
from ...errors import UserError
from ...ops.loss import token_logp
from ..chat_data import ChatRow, Example
from .config import SftConfig
from .packing import Packed
from .students import Losses, dtype_of
from .templates import Template

# Of these, logits are head(hidden) and attention asks the registered function, with nothing in between.
FAMILIES = ("llama", "qwen2", "qwen3")
ATTENTION = "dsv3_packed"


class TemplateEncoder:
    """Conversations in the student's own chat template; see samples.Encoder."""

    def __init__(self, config: SftConfig):
        _check(config)
        transformers = _transformers(config.model)
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"{config.model}: its tokenizer cannot be read ({_first_line(error)})") from None
        self.template = Template(self.tokenizer, config.model)
        self.shape = transformers.AutoConfig.from_pretrained(config.model, local_files_only=True)
        if self.shape.model_type not in FAMILIES:
            raise UserError(f"{config.model} is a {self.shape.model_type!r}; students are of {', '.join(FAMILIES)}")
        if "sliding_attention" in (getattr(self.shape, "layer_types", None) or ()):
            raise UserError(f"{config.model} has layers of sliding attention, which dsv3 does not train")
        self.context: int = self.shape.max_position_embeddings
        self.thinking_in_loss = config.data.thinking_in_loss
        parts = [self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template, self.thinking_in_loss]
        self.fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def encode(self, row: ChatRow) -> list[Example]:
        return self.template.encode(row, self.thinking_in_loss)


class TransformersStudent:
    """See students.Student."""

    base = ""

    def __init__(self, config: SftConfig, encoder: TemplateEncoder, device: torch.device):
        self.encoder = encoder
        transformers = _transformers(config.model)
        transformers.AttentionInterface.register(ATTENTION, _attention)
        try:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                config.model, dtype=dtype_of(config), attn_implementation=ATTENTION, local_files_only=True,
                output_loading_info=True,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{config.model}: cannot be read ({_first_line(error)})") from None
        if missing := sorted(loaded[1]["missing_keys"]):  # which transformers makes up
            raise UserError(f"{config.model}: {missing[0]} is not in its weights ({len(missing)} tensors are missing)")
        self.module: Any = loaded[0].to(device)
        if config.recompute == "full":
            _recompute(self.module)
        self.module.train()
        self._stop_at(encoder.template.end)

    def losses(self, batch: Packed, share: float) -> Losses:
        loss = -(self.logp(batch) * batch.weights).sum()
        return Losses(loss, {"loss": loss.detach()}, {})

    def logp(self, batch: Packed) -> Tensor:
        lengths = batch.cu_seqlens.diff().tolist()
        states = self.module.model(
            input_ids=batch.tokens[None], position_ids=batch.positions[None], use_cache=False, sample_lengths=lengths
        ).last_hidden_state[0]
        return token_logp(states[batch.scored], self.module.get_output_embeddings().weight, batch.targets)

    def flops_per_token(self, length: int) -> int:
        shape, weights = self.module.config, sum(p.numel() for p in self.module.parameters())
        if not shape.tie_word_embeddings:
            weights -= self.module.get_input_embeddings().weight.numel()
        size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        return 6 * weights + 6 * shape.num_hidden_layers * shape.num_attention_heads * size * length

    def save(self, target: Path) -> None:
        """In the Hugging Face format, tokenizer and template included."""
        with atomic_directory(target, OWNED) as place:
            self.module.save_pretrained(place)
            self.encoder.tokenizer.save_pretrained(place)

    def advice(self, target: Path) -> str:
        return ", for transformers and every server that reads its format"

    def _stop_at(self, end: int) -> None:
        """Generation ends at the template's end of a turn, which a base model does not name."""
        for config in (self.module.generation_config, self.module.config):
            known = config.eos_token_id
            ends = [] if known is None else known if isinstance(known, list) else [known]
            if end not in ends:
                config.eos_token_id = [*ends, end]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sample_lengths: list[int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample. query [1, H, T, d], key and value [1, Hk, T, d] -> [1, T, H, d].

    sample_lengths: of the samples that the T tokens are, one after the other; neighbours of one length are one call.
    Without them, the rows of a batch are what does not see each other, for whoever calls the model in another way.
    """
    if sample_lengths is None:
        out = _causal(query, key, value, scaling)
        return out.transpose(1, 2).contiguous(), None
    parts, start = [], 0
    for length, same in groupby(sample_lengths):
        count = len(list(same))
        rows = slice(start, start + count * length)
        q, k, v = (x[0, :, rows].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value))
        parts.append(_causal(q, k, v, scaling).transpose(1, 2).flatten(0, 1))
        start = rows.stop
    return torch.cat(parts)[None], None


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _recompute(module: Any) -> None:
    """Keep the inputs of the layers only; the method has two names in the versions of transformers."""
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _check(config: SftConfig) -> None:
    """What only models of the family have."""
    for name, wanted in (
        ("lora.rank", config.lora.rank),
        ("mtp_weight", config.mtp_weight),
        ("balance.alpha", config.balance.alpha),
        ("balance.gamma", config.balance.gamma),
    ):
        if wanted:
            raise UserError(f"{name} is for models of the DeepSeek-V3 family, which {config.model} is not: set it to 0")
    if config.data.format != "auto":
        raise UserError(
            f'data.format is {config.data.format!r}, but {config.model} has a template of its own: set it to "auto"'
        )


def _transformers(what: str) -> Any:
    transformers = library("transformers", what)
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
