"""The teacher: a model of ours in this process, or one behind an endpoint; and what traces say about it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...core.completer import Completer, Conversation, LocalCompleter, Reply, split_reply
from ...core.encoding import detect_format
from ...core.endpoint import Endpoint
from ...core.files import atomic_write
from ...core.generate import Completion, Rollout, make_rollout
from ...core.model import DeepseekV3
from ...core.tokenizer import Tokenizer
from ...errors import UserError
from ..grpo.config import PLAIN_TEMPLATE
from ..grpo.prompts import PromptFormat
from .config import TeacherSection

HASHED = ("config.json", "tokenizer.json", "*.safetensors")
HASHES = "checkpoint_hashes.json"


class PlainCompleter(LocalCompleter):
    """Puts questions to a base model in the plain template of R1-Zero."""

    def __init__(self, rollout: Rollout, tokenizer: Tokenizer, name: str, batch: int = 64) -> None:
        super().__init__(rollout, tokenizer, "v3", name=name, batch=batch)
        self.plain = PromptFormat(tokenizer, PLAIN_TEMPLATE)

    def encode(self, conversation: Conversation) -> list[int]:
        return self.plain.encode(conversation)

    def reply(self, completion: Completion) -> Reply:
        """Behind "Assistant:", text goes on with a space, which belongs to neither thought nor reply."""
        reply = super().reply(completion)
        text = reply.text.lstrip()
        return Reply(text, *split_reply(text), reply.finish_reason, reply.tokens)


def open_completer(
    section: TeacherSection,
    device: torch.device,
    on_refusal: Callable[[int, UserError], None] | None = None,
) -> tuple[Completer, tuple[int, ...]]:
    """The teacher, and the ids that end its replies (none for an endpoint, which knows its own).

    Raises UserError where there is no such model, or nobody answers at the endpoint.
    """
    if section.endpoint:
        endpoint = open_endpoint(section, on_refusal)
        endpoint.check()
        return endpoint, ()
    tokenizer = Tokenizer.load(section.model)
    dtype = {"": None, "fp32": torch.float32, "bf16": torch.bfloat16}[section.precision]
    model = DeepseekV3.from_pretrained(section.model, dtype=dtype, device=device)
    return completer_of(model, tokenizer, section)


def completer_of(model: DeepseekV3, tokenizer: Tokenizer, section: TeacherSection) -> tuple[Completer, tuple[int, ...]]:
    """A model in memory as a completer; see `open_completer`."""
    rollout = make_rollout(model, decode=partial(tokenizer.decode, skip_special=True))
    name = section.model
    if section.format == PLAIN_TEMPLATE:
        plain = PlainCompleter(rollout, tokenizer, name, section.batch)
        return plain, (plain.plain.end_id, tokenizer.eos_id)
    format = section.format or detect_format(tokenizer)
    local = LocalCompleter(rollout, tokenizer, format, section.thinking, name, section.batch)
    return local, (local.end, tokenizer.eos_id)


def open_endpoint(section: TeacherSection, on_refusal: Callable[[int, UserError], None] | None = None) -> Endpoint:
    return Endpoint(
        section.endpoint, section.served_model, section.api_key_env, section.timeout, section.retries,
        section.concurrency, section.body, on_refusal,
    )  # fmt: skip


def identity(section: TeacherSection, run_dir: Path) -> dict[str, Any]:
    """What a trace says about its teacher. A checkpoint is named by its path and the sha256 of its files.

    UserError where no teacher is named, or the directory holds no model.
    """
    if not section.model and not section.endpoint:
        raise UserError("teacher.model or teacher.endpoint must be set: somebody has to write the samples")
    if section.endpoint:
        served = Endpoint(section.endpoint, section.served_model)
        return {"teacher": section.served_model, "endpoint": served.base}
    known = {"format": section.format, "thinking": section.thinking}
    return {"teacher": section.model, "checkpoint_sha256": checkpoint_hash(Path(section.model), run_dir), **known}


def checkpoint_hash(directory: Path, cache: Path) -> str:
    """sha256 of the names and contents of a model's configuration, tokenizer and weights.

    Reading the weights of a large model takes minutes, so what was found is kept in `cache`, and is good as long as
    sizes and times of the files stay.
    """
    files = sorted({path for pattern in HASHED for path in directory.glob(pattern)})
    if not files:
        raise UserError(f"{directory} holds no model (config.json and safetensors): name a directory that does")
    stamp = json.dumps([[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files])
    key = hashlib.sha256(f"{directory.resolve()}\n{stamp}".encode()).hexdigest()
    path = cache / HASHES
    known: Mapping[str, str] = json.loads(path.read_text()) if path.exists() else {}
    if key in known:
        return known[key]
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    with atomic_write(path, "w") as record:
        json.dump({**known, key: digest.hexdigest()}, record, indent=1)
    return digest.hexdigest()
