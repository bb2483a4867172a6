"""Everything that the HTTP server bounds or leaves open, with its default."""

import secrets
from dataclasses import dataclass, field

from ...core.encoding import FORMATS
from ...errors import UserError


@dataclass(frozen=True)
class Settings:
    """How the server behaves.

    models: names under which the model is asked for, the first its own, the others aliases.
    format: of chats, see core/encoding.py; None for a model without chat tokens, which serves plain completions only.
    thinking: reason first where the format leaves that open and the request does not say.
    also_reasoning: write reasoning under `reasoning`, too, as newer servers name it.
    temperature, top_p: of requests that say nothing.
    api_keys: each has a prefix cache of its own; with none, everybody may ask. secret: what the salts of these caches
        are made from; one for all replicas that share a cache, else drawn. open_metrics: /metrics needs no key.
    cors_origins: pages of which origins may call from a browser.

    max_body: bytes of a request. max_prompts: of one request. max_queued: requests that wait for their first token;
    max_queued_tokens: of their prompts. max_per_key: requests under way at a time for one key.
    retry_after: seconds, told with a refusal. timeout: seconds that a request may take, waiting included.
    slow_sender: seconds that a body may take to come in. slow_reader: seconds that a client may take to make room for
    what it is sent. keep_alive: seconds without news after which a stream says that it lives.
    buffered: outputs kept for a client that reads slowly.
    long_text: characters from which tokens are counted on another thread. known_text: characters of earlier prompts
    whose tokens are remembered; 0 is none. max_guide: bytes of a grammar or schema.
    max_verify: samples that one request with `verify` may draw.
    """

    models: tuple[str, ...]
    format: str | None = None
    thinking: bool = False
    also_reasoning: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    api_keys: tuple[str, ...] = ()
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    open_metrics: bool = False
    cors_origins: tuple[str, ...] = ()
    max_body: int = 8 * 2**20
    max_prompts: int = 1024
    max_queued: int = 256
    max_queued_tokens: int = 4_000_000
    max_per_key: int | None = None
    retry_after: int = 2
    timeout: float | None = 1800.0
    keep_alive: float = 10.0
    slow_sender: float = 60.0
    slow_reader: float = 30.0
    buffered: int = 1024
    long_text: int = 16_384
    known_text: int = 16 * 2**20
    max_guide: int = 128 * 1024
    max_verify: int = 32

    def __post_init__(self) -> None:
        positive = (
            "max_body",
            "max_prompts",
            "max_queued",
            "max_queued_tokens",
            "keep_alive",
            "slow_sender",
            "slow_reader",
        )
        checks = [
            (bool(self.models) and all(self.models), "the model needs a name"),
            (self.format is None or self.format in FORMATS, "the chat format is unknown"),
            (all(key.strip() == key and key.isascii() and len(key) >= 8 for key in self.api_keys), _KEYS),
            (len(self.secret) >= 16, "the secret must have 16 bytes or more"),
            (0 <= self.temperature <= 2, "temperature must be between 0 and 2"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (self.known_text >= 0, "known_text must not be negative"),
            (self.timeout is None or self.timeout > 0, "timeout must be above 0"),
            (self.max_per_key is None or self.max_per_key > 0, "max_per_key must be 1 or more"),
            *((getattr(self, name) > 0, f"{name} must be above 0") for name in positive),
        ]
        for holds, text in checks:
            if not holds:
                raise UserError(f"server: {text}")


_KEYS = "an API key must have 8 ASCII characters or more and no spaces around it"
