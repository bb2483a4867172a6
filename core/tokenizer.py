"""The tokenizer: byte-level BPE of the family, read, trained and written; and text that cannot become control tokens.

The released tokenizer.json flags most control tokens (`<think>`, `<｜User｜>`, the tool markers) `special: false`, so
ordinary use of it finds them inside user text. Here `encode` never does: control tokens come from `Special` segments.
"""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

from ..errors import UserError
from . import special_tokens as family
from .chat_templates import chat_template
from .files import atomic_write
from .special_tokens import Segment, Special
from .tiktoken_vocab import byte_alphabet, to_tokenizer_json

_CJK = r"[一-龥぀-ゟ゠-ヿ]+"
_DIGITS, _SINGLE_DIGITS = r"\p{N}{1,3}", r"\p{N}"
_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
"""The pre-tokenizer of DeepSeek-V3, in its order: digits, Chinese and Japanese runs, words with what leads them."""


def pre_tokenizer(single_digits: bool = False) -> pre_tokenizers.PreTokenizer:
    """The V3 pre-tokenizer. `single_digits` cuts numbers into digits instead of groups of up to three: a small
    vocabulary has no room for 1,000 numbers, and arithmetic is easier to learn on digits."""
    digits = _SINGLE_DIGITS if single_digits else _DIGITS
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (digits, _CJK, _WORDS)]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _cuts_words(tree: dict[str, Any]) -> bool:
    """Whether a tokenizer.json changes no text and cuts it as `pre_tokenizer` does."""
    if (tree.get("normalizer") or {}).get("normalizers") or not all(map(is_control, tree["added_tokens"])):
        return False
    steps = (tree.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    for single_digits in (True, False):
        ours = json.loads(pre_tokenizer(single_digits).__getstate__())["pretokenizers"]
        ours[-1]["trim_offsets"] = steps[-1].get("trim_offsets")  # where tokens stand in the text is not asked
        if steps == ours:
            return True
    return False


def is_control(token: dict[str, Any]) -> bool:
    """Whether an added token of tokenizer.json steers the model: flagged special, or named like `<think>` or `[EOT]`.
    DeepSeek-V2 also adds letters, which are text."""
    return bool(token["special"]) or re.fullmatch(r"<.+>|\[[A-Z]+\]", token["content"]) is not None


def _content(token: Any) -> str | None:
    """tokenizer_config.json writes a token as text or as an object."""
    return token["content"] if isinstance(token, dict) else token


def _valid(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start} of the text is half of a surrogate pair ({text[error.start]!r}), which is not "
            "Unicode text; decode the source as UTF-8 with errors='replace' first"
        ) from None
    return text


class Tokenizer:
    """Text to ids and back. Make one with `load` or `train`.

    specials: id of every control token by its text. vocab_size: highest id + 1 (a model may pad its embedding beyond).
    words_apart: a text may be cut behind any ASCII letter that a space and another ASCII letter follow, and encoded in
        parts. True of V3's pre-tokenizer, none of whose matches goes on, or looks, beyond such a place.
    """

    def __init__(self, document: str, config: dict[str, Any]) -> None:
        """document: text of a tokenizer.json; config: content of a tokenizer_config.json (may be empty)."""
        self._document = document
        self._config = config
        tree = json.loads(document)
        if (tree.get("model") or {}).get("type") != "BPE" or (tree.get("decoder") or {}).get("type") != "ByteLevel":
            raise UserError("tokenizer.json holds no byte-level BPE, so it is not of the DeepSeek-V3 family")
        added = tree["added_tokens"]
        self.specials: dict[str, int] = {token["content"]: token["id"] for token in added if is_control(token)}
        self.words_apart = _cuts_words(tree)
        self._skipped = frozenset(token["id"] for token in added if token["special"])
        for token in added:
            token["special"] = is_control(token)
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(tree, ensure_ascii=False))
        self._backend.encode_special_tokens = True  # tokens flagged special are not looked for in text
        for name, number in self.specials.items():
            if number in self._backend.encode(name, add_special_tokens=False).ids:
                raise UserError(f"tokenizer.json lets plain text become the control token {name!r}; use another one")
        self.vocab_size: int = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, or else tiktoken.model, with tokenizer_config.json and chat_template.jinja if there.

        Raises UserError if the directory has no tokenizer, or one of another kind.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise UserError(f"{directory} is not a directory; give the folder of a model")
        config = _read_config(directory / "tokenizer_config.json")
        template = directory / "chat_template.jinja"
        if template.exists():
            config["chat_template"] = template.read_text(encoding="utf-8")
        file, ranks = directory / "tokenizer.json", directory / "tiktoken.model"
        if file.exists():
            try:
                return cls(file.read_text(encoding="utf-8"), config)
            except UserError as error:
                raise UserError(f"{directory}: {error}") from None
            except Exception as error:  # the library raises bare Exception for a damaged file
                raise UserError(f"{file} cannot be read ({error}); fetch it again") from error
        if ranks.exists():
            if not config.get("added_tokens_decoder"):
                raise UserError(
                    f"{directory} needs a tokenizer_config.json that names the control tokens of {ranks.name}"
                )
            return cls(to_tokenizer_json(ranks, config), config)
        raise UserError(f"{directory} has no tokenizer.json and no tiktoken.model; copy one there or train one")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, single_digits: bool = False) -> "Tokenizer":
        """Learns a byte-level BPE with exactly `vocab_size` ids: 0..2 bos, eos, pad; bytes and merges; reserved place
        holders where the texts have too few repeated pairs; the 17 other control tokens last, in V3's order.

        The same texts in the same order give the same tokenizer. Raises UserError if vocab_size is below 276.
        """
        smallest = len(family.HEAD) + 256 + len(family.TAIL)
        if vocab_size < smallest:
            raise UserError(f"vocab_size {vocab_size} is too small: bytes and control tokens alone need {smallest}")
        learner = tokenizers.Tokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizer(single_digits)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(family.HEAD) - len(family.TAIL),
            min_frequency=2,
            initial_alphabet=sorted(byte_alphabet()),
            show_progress=False,
        )
        learner.train_from_iterator((_valid(text) for text in texts), trainer)
        tree = json.loads(learner.to_str())
        learned = sorted(tree["model"]["vocab"], key=tree["model"]["vocab"].__getitem__)
        vocab = [*family.HEAD, *learned]
        fill = [family.place_holder(number) for number in range(vocab_size - len(vocab) - len(family.TAIL))]
        tree["model"]["vocab"] = {token: number for number, token in enumerate(vocab)}
        controls = [*enumerate(family.HEAD), *enumerate([*fill, *family.TAIL], start=len(vocab))]
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        skipped = family.SKIPPED.union(fill)
        tree["added_tokens"] = [
            {"id": number, "content": name, **flags, "special": name in skipped} for number, name in controls
        ]
        tree["decoder"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        config = {"bos_token": family.BOS, "eos_token": family.EOS, "pad_token": family.PAD, "add_bos_token": False}
        return cls(json.dumps(tree, ensure_ascii=False), config)

    def save(self, directory: str | Path, chat_format: str | None = None) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads.

        chat_format "v3", "r1" or "v3.1" sets the chat template; None keeps the one it was loaded with, or else v3's.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        kept = {k: v for k, v in self._config.items() if k not in {"auto_map", "sp_model_kwargs", "legacy"}}
        kept.update({k: _content(v) for k, v in kept.items() if k.endswith("_token") and isinstance(v, dict)})
        # the generic class reads tokenizer.json as it is; transformers' Llama class puts its own pre-tokenizer there
        config = {**kept, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if chat_format is not None or ("chat_template" not in config and family.USER in self.specials):
            config["chat_template"] = chat_template(chat_format or "v3")
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        with atomic_write(directory / "tokenizer.json", "w") as file:
            file.write(self._document)
        with atomic_write(directory / "tokenizer_config.json", "w") as file:
            file.write(text)
        (directory / "chat_template.jinja").unlink(missing_ok=True)  # it would win over the configuration

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template that came with the tokenizer."""
        template = self._config.get("chat_template")
        return template if isinstance(template, str) else None

    def _configured(self, key: str, fallback: str) -> int:
        name = _content(self._config.get(key)) or fallback
        if name not in self.specials:
            raise UserError(f"the tokenizer has no {key} (looked for {name!r})")
        return self.specials[name]

    @property
    def bos_id(self) -> int:
        return self._configured("bos_token", family.BOS)

    @property
    def eos_id(self) -> int:
        return self._configured("eos_token", family.EOS)

    @property
    def pad_id(self) -> int:
        return self._configured("pad_token", family.PAD)

    def special_id(self, name: str) -> int:
        """Id of a control token; UserError if the tokenizer has none of that name."""
        try:
            return self.specials[name]
        except KeyError:
            raise UserError(
                f"the tokenizer has no token {name!r}: a tokenizer without the chat tokens cannot hold a chat; "
                "use the model's own, or another chat format"
            ) from None

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of a text. Text never gives control tokens unless allow_special, which is for prompts of the programmer.

        Raises UserError on half surrogates.
        """
        if not allow_special:
            return self._backend.encode(_valid(text), add_special_tokens=False).ids
        return self.encode_segments(self.segments(text))

    def segments(self, text: str) -> list[Segment]:
        """A text in which control tokens are spelt out, told apart. For prompts of the programmer."""
        pieces = self._control_pattern.split(text)
        return [Special(piece) if i % 2 else piece for i, piece in enumerate(pieces)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, in parallel; as `encode` of each."""
        encodings = self._backend.encode_batch_fast([_valid(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_segments(self, segments: Iterable[Segment]) -> list[int]:
        """Ids of a prompt, from `encode_chat` or `encode_fim`: control tokens by name, text as text."""
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, Special):
                ids.append(self.special_id(segment.name))
            elif segment:
                ids.extend(self.encode(segment))
        return ids

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.specials, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "(?!)()")

    @cached_property
    def _bytes(self) -> list[bytes]:
        """Bytes of every id; an id without a token has none."""
        of_character = {character: byte for byte, character in enumerate(byte_alphabet())}
        table = [b""] * self.vocab_size
        for token, number in self._backend.get_vocab(with_added_tokens=True).items():
            added = number in self._added
            spelled = not added and all(character in of_character for character in token)
            table[number] = bytes(of_character[c] for c in token) if spelled else token.encode("utf-8")
        return table

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._backend.get_added_tokens_decoder())

    def token_bytes(self, token_id: int, skip_special: bool = False) -> bytes:
        """Bytes of one token. An id beyond the vocabulary (padding of the embedding) has none; UserError below 0."""
        if token_id < 0:
            raise UserError(f"token id {token_id} is negative: remove padding and ignored labels before decoding")
        if token_id >= self.vocab_size or (skip_special and token_id in self._skipped):
            return b""
        return self._bytes[token_id]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. skip_special leaves out the tokens that tokenizer.json
        flags special (bos, eos, pad, place holders), as transformers does; thinking and tool markers stay."""
        return b"".join(self.token_bytes(i, skip_special) for i in ids).decode("utf-8", errors="replace")

    def stream(self, skip_special: bool = False) -> "StreamDecoder":
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self, skip_special)


class StreamDecoder:
    """Text of a token stream. The pieces joined equal `Tokenizer.decode` of all ids; no character is ever torn."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id, self._skip_special))

    def finish(self) -> str:
        """What is left at the end: U+FFFD if the stream stopped inside a character."""
        return self._decoder.decode(b"", final=True)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object")
    return config
