"""A student and its teacher, both models of ours with one tokenizer."""

from pathlib import Path

import torch
from torch import Tensor

from ...core.model import DeepseekV3
from ...core.step import Routing
from ...core.tokenizer import Tokenizer
from ...errors import UserError
from ...parallel.data import DataParallel
from ..data.transforms import tokenizer_fingerprint
from ..grpo.update import Pack
from ..sft.packing import Packed
from .student_config import StudentConfig, TeacherModelSection

DTYPES = {"": None, "fp32": torch.float32, "bf16": torch.bfloat16}


def load_teacher(section: TeacherModelSection, device: torch.device) -> tuple[DeepseekV3, Tokenizer]:
    if not section.model:
        raise UserError("teacher.model is not set: name the directory of a model whose probabilities are learnt")
    tokenizer = Tokenizer.load(section.model)
    model = DeepseekV3.from_pretrained(section.model, dtype=DTYPES[section.precision], device=device)
    return model.requires_grad_(False).eval(), tokenizer


def load_student(config: StudentConfig, tokenizer: Tokenizer, parallel: DataParallel) -> DeepseekV3:
    """The student, trained or fresh; the same on every process. Its MTP modules do not train.

    Raises UserError where there is none, or its tokenizer is not `tokenizer`, the teacher's.
    """
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    if bool(config.model) == config.fresh.wanted:
        raise UserError("name the student: either `model`, a directory, or the shape of a `fresh` one")
    if config.model:
        own = Tokenizer.load(config.model)
        if tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer):
            raise UserError(
                f"{Path(config.model)} and the teacher have different tokenizers, so their probabilities cannot be "
                "compared: distil by samples (stages = ['sft']) instead"
            )
        model = DeepseekV3.from_pretrained(config.model, dtype=dtype, device=parallel.device, fp8="dequantize")
    else:
        shape = config.fresh.resolve()
        if tokenizer.vocab_size > shape.vocab_size:
            raise UserError(
                f"the teacher's tokenizer has {tokenizer.vocab_size} tokens, fresh.vocab_size is {shape.vocab_size}: "
                "raise it"
            )
        shape = shape.replace(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
        model = DeepseekV3(shape, device=parallel.device, dtype=dtype)
        model.init_weights(config.fresh.init_std, config.fresh.embedding_std, config.seed)
        parallel.broadcast(model.state_dict().values())
    for layer in range(model.config.num_hidden_layers, model.config.num_layers_with_mtp):
        model.model.layers[str(layer)].requires_grad_(False)
    model.recompute = config.recompute == "full"
    return model.train()


def hidden_states(model: DeepseekV3, pack: Pack | Packed, routing: Routing | None = None) -> Tensor:
    """[N, D] behind the final norm, at the N places whose next token is learnt."""
    step = model.step(pack.positions, pack.cu_seqlens, pack.max_len, routing=routing, limit=pack.max_len)
    rows = pack.scored if isinstance(pack, Packed) else pack.rows
    return model.model.norm(model.blocks(model.embed(pack.tokens), step)).index_select(0, rows)


def head(model: DeepseekV3, tokenizer: Tokenizer) -> Tensor:
    """[V, D] of the tokenizer's tokens: what pads the vocabulary differs between models and is no outcome."""
    return model.head_weight[: tokenizer.vocab_size]
