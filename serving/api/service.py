"""What every route needs: the engine, the tokenizer, the settings, and what counts and admits requests."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, TypeVar

from ...core.encoding import encode_chat, stop_token
from ...core.special_tokens import Segment, Special
from ...core.tokenizer import Tokenizer
from ..messages import EngineClient
from .auth import Keys, Tenant
from .errors import NotFound
from .known_text import KnownTexts
from .limits import Gate
from .metrics import Metrics
from .settings import Settings

if TYPE_CHECKING:
    from .generation import Generation

T = TypeVar("T")

VERSION = metadata.version("dsv3")


class Service:
    """One server. Raises UserError for a tokenizer without the control tokens of the chat format.

    chat_end: id of the token that ends the assistant's turn, None without a chat format.
    window: tokens that prompt and completion of a request may have together.
    """

    def __init__(self, client: EngineClient, tokenizer: Tokenizer, settings: Settings) -> None:
        self.client, self.tokenizer, self.settings = client, tokenizer, settings
        self.model = settings.models[0]
        self.metrics = Metrics(self.model, client)
        self.gate = Gate(settings, self.metrics)
        self.keys = Keys(settings.api_keys, settings.secret)
        self.window = min(client.info.context, client.info.capacity)
        self.chat_end: int | None = None
        if settings.format is not None:
            tokenizer.encode_segments(encode_chat([{"role": "user", "content": ""}], settings.format))
            self.chat_end = tokenizer.special_id(stop_token(settings.format))
        info = client.info
        made_of = f"{VERSION} {info.model} {info.backend} {info.vocab_size}"
        self.fingerprint = "fp_" + hashlib.sha256(made_of.encode()).hexdigest()[:12]
        self.generations: set[Generation] = set()
        self._known = KnownTexts(tokenizer, settings.known_text)
        self._long_texts = asyncio.Semaphore(2)

    def check_model(self, name: str | None) -> None:
        """Raises NotFound unless `name` is the model, an alias, or left out."""
        if name is not None and name not in self.settings.models:
            raise NotFound("there is no model of this name; GET /v1/models lists them", "model", "model_not_found")

    async def encode(self, tenant: Tenant, *prompts: Sequence[Segment]) -> list[list[int]]:
        """Ids of prompts; long ones are encoded on another thread, where they do not hold up everybody else."""
        size = sum(len(segment) for prompt in prompts for segment in prompt if isinstance(segment, str))
        if size <= self.settings.long_text:
            return [self.encode_now(tenant, prompt) for prompt in prompts]
        return await self.aside(lambda: [self.encode_now(tenant, prompt) for prompt in prompts])

    async def aside(self, work: Callable[[], T]) -> T:
        """Run `work` on another thread; two at a time, as each takes a core."""
        async with self._long_texts:
            return await asyncio.to_thread(work)

    def encode_now(self, tenant: Tenant, prompt: Sequence[Segment]) -> list[int]:
        """As Tokenizer.encode_segments; what this tenant has sent before takes no time."""
        ids: list[int] = []
        for segment in prompt:
            if isinstance(segment, Special):
                ids.append(self.tokenizer.special_id(segment.name))
            elif segment:
                ids += self._known.encode(segment, tenant.number)
        return ids
