"""A dense student for tests: a model of transformers with random weights, a tokenizer with a template of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import TEXTS

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3 and R1's distilled models have it: earlier replies without thoughts, and a prompt that opens one.
OPENING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ (m.content or '').split('</think>')[-1].lstrip() }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
MARKS = ["<|im_start|>", "<|im_end|>"]


def tokenizer_of(template: str = CHATML, normalizer: Any = None) -> Any:
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    if normalizer is not None:
        plain.normalizer = normalizer
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    plain.train_from_iterator(TEXTS, trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|end|>")
    made.add_special_tokens({"additional_special_tokens": MARKS})
    made.chat_template = template
    return made


def write_student(folder: Path, kind: str = "qwen2", template: str = CHATML, **fields: Any) -> Path:
    tokenizer = tokenizer_of(template)
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(shape | fields))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
