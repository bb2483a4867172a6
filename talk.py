"""What `dsv3 generate` and `dsv3 chat` share: from MODEL to a tokenizer and a rollout, from options to sampling.

MODEL is a directory in the Hugging Face format, or a hub id (OWNER/NAME) with --revision. What comes from the hub is
configuration, weights and tokenizer; never code.
"""

import argparse
import difflib
import io
import re
import secrets
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .backends import activate, first_line
from .core.config import ModelConfig
from .core.generate import Rollout, SamplingParams
from .core.model import DeepseekV3
from .core.presets import PRESETS
from .core.tokenizer import Tokenizer
from .engine_args import check_drafts
from .engine_process import cache_dtype
from .errors import UserError
from .serving.rollout import EngineRollout

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tiktoken.model")
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Source:
    """A model that was found and whose small files fit together; its weights are still on the disk."""

    directory: Path
    config: ModelConfig
    tokenizer: Tokenizer

    def load(self, args: argparse.Namespace, cache: str = "auto", speculative_tokens: int = 0) -> Rollout:
        """Activate the backend and read the weights, as --backend, --dtype and --fp8 say.

        cache, speculative_tokens: as of --cache and --speculative-tokens.
        """
        check_drafts(speculative_tokens, self.config)
        device = activate(args.backend).device
        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        model = DeepseekV3.from_pretrained(self.directory, device=device, dtype=dtype, fp8=args.fp8)
        decode = partial(self.tokenizer.decode, skip_special=True)
        return EngineRollout(model, decode, cache_dtype(cache), speculative_tokens=speculative_tokens)

    def end_tokens(self, *names: str) -> frozenset[int]:
        """Ids that end a text: the configuration's, the tokenizer's end of sentence, and the control tokens `names`."""
        ends = {self.tokenizer.eos_id, *self.config.eos_token_ids}
        return frozenset(ends.union(self.tokenizer.special_id(name) for name in names))


def open_source(model: str, revision: str | None) -> Source:
    """Find MODEL and read its configuration and tokenizer.

    Raises UserError, in one line, if there is no such model, no tokenizer, or the two do not belong together.
    """
    directory = _find(model, revision)
    config = ModelConfig.from_pretrained(directory)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's vocabulary only "
            f"{config.vocab_size} tokens; copy the tokenizer there that the model was trained with"
        )
    return Source(directory, config, tokenizer)


def _find(model: str, revision: str | None) -> Path:
    path = Path(model)
    if path.is_dir():
        if revision is not None:
            raise UserError(f"--revision is for ids of the hub, and {model} is a directory here; leave it out")
        return path.absolute()  # an absolute path is never mistaken for a preset's name
    if path.exists():
        raise UserError(f"{model} is a file; give the directory that holds config.json, safetensors and tokenizer")
    if model in PRESETS:
        raise UserError(f"{model} is a preset, which has a shape but no weights; give a directory with a trained model")
    if HUB_ID.fullmatch(model):
        if revision is None:
            raise UserError(f"{model}: no such directory; if it is an id of the hub, pin it with --revision COMMIT")
        return _fetch(model, revision)
    close = difflib.get_close_matches(model, [entry.name for entry in Path().iterdir() if entry.is_dir()], 1)
    hint = f"did you mean {close[0]!r}?" if close else "give a directory in the Hugging Face format"
    raise UserError(f"{model}: no such directory; {hint}")


def _fetch(model: str, revision: str) -> Path:
    """Download what is missing of a hub model into the hub's own cache; an interrupted download is taken up again."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{model}: models of the hub need another package: pip install huggingface-hub") from None
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # of the network, the hub, the disk: the library has no common class for them
        raise UserError(
            f"{model}: fetching revision {revision} failed ({first_line(error)}); check id and connection"
        ) from error


def sampling(args: argparse.Namespace, source: Source, ends: Iterable[int]) -> SamplingParams:
    """What the options of the command line say. Raises UserError for values out of range."""
    if args.seed is not None and not 0 <= args.seed < 2**62:
        raise UserError("sampling: seed must be between 0 and 2**62 - 1")
    return SamplingParams(
        temperature=args.temperature,
        top_k=min(args.top_k, source.config.vocab_size),
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        max_tokens=args.max_tokens,
        stop=tuple(args.stop),
        stop_token_ids=tuple(sorted(ends)),
    )


def draw_seed() -> int:
    """A fresh seed, short enough to be typed again (torch's own generator starts every process with the same one)."""
    return secrets.randbits(32)


def forgive_encodings() -> None:
    """Input that is not UTF-8 and output that the terminal cannot show become replacement characters, not errors."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def harmless(text: str) -> str:
    """`text` for a terminal: a model must not be able to move the cursor, or worse, by the bytes that it emits."""
    return CONTROLS.sub("\ufffd", text.replace("\r", ""))
