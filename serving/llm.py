"""`dsv3.LLM`: a model with its tokenizer and an engine, in this process.

llm = dsv3.LLM("runs/quickstart/model")
[reply] = llm.chat([{"role": "user", "content": "What is 3 + 4?"}], dsv3.SamplingParams(temperature=0.6))
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..core.encoding import detect_format, encode_chat, stop_token
from ..core.generate import Completion, Token
from ..core.model import DeepseekV3
from ..core.records import library
from ..core.reply_events import ReplyParts
from ..core.reply_stream import ReplyStream, opens_reasoning
from ..core.sampling_params import Guide, SamplingParams
from ..core.text_stream import TextStream
from ..core.tokenizer import Tokenizer
from ..errors import UserError
from ..ops.formats import E4M3
from .rollout import CACHE_BYTES, REQUESTS, EngineRollout
from .verify import Verification, decide

if TYPE_CHECKING:
    from .guides import Guides

Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Generated:
    """What a prompt became. text: without what ended it. The rest is of `completion`, see core.generate.Completion."""

    text: str
    completion: Completion

    @property
    def finish_reason(self) -> str | None:
        return self.completion.finish_reason

    @property
    def token_ids(self) -> list[int]:
        return self.completion.token_ids


@dataclass(frozen=True)
class ChatReply:
    """A reply to a conversation. content: what is said; reasoning: what was thought before. tool_calls: OpenAI's form.
    verdict: how it was chosen among several, where that was asked for."""

    content: str
    reasoning: str
    tool_calls: list[dict[str, Any]]
    finish_reason: str | None
    completion: Completion
    verdict: Verification | None = None

    def message(self) -> dict[str, Any]:
        """As a message of the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        return message | ({"tool_calls": self.tool_calls} if self.tool_calls else {})


class GuidesOnDemand:
    """`Guides` that are made for the first guide, and anew for the first one behind `close`: they have threads and
    processes, and want a package that others do without."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Collection[int]) -> None:
        self._of = tokenizer, vocab_size, ends
        self._made: Guides | None = None

    def compile(self, guide: Guide) -> Future[Any]:
        """See Guides.compile. UserError in the future, too, where llguidance is missing."""
        if self._made is None:
            try:
                library("llguidance", "guided decoding", "'dsv3[serve]'")
            except UserError as error:
                missing: Future[Any] = Future()
                missing.set_exception(error)
                return missing
            from .guides import Guides

            self._made = Guides(*self._of)
        return self._made.compile(guide)

    def close(self) -> None:
        made, self._made = self._made, None
        if made is not None:
            made.close()


class LLM:
    """directory: a model in the Hugging Face format. backend, dtype, fp8: as of `DeepseekV3.from_pretrained`.

    cache_dtype: of the latents; "fp8" halves them, None is the weights' type. cache_bytes: what the cache may grow to.
    speculative_tokens: drafted per step by the MTP module; texts stay the same. requests: that run at a time.
    format: of chats, "auto" goes by the tokenizer.

    A context manager, which closes it at the end.
    """

    def __init__(
        self,
        directory: str | Path,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        fp8: str = "keep",
        cache_dtype: torch.dtype | Literal["fp8"] | None = None,
        cache_bytes: int = CACHE_BYTES,
        speculative_tokens: int = 0,
        requests: int = REQUESTS,
        format: str = "auto",
    ) -> None:
        self.tokenizer = Tokenizer.load(directory)
        self.model = DeepseekV3.from_pretrained(directory, backend, dtype, fp8=fp8)
        config = self.model.config
        if self.tokenizer.vocab_size > config.vocab_size:
            raise UserError(f"{directory}: the tokenizer has more tokens than the model; copy the model's own there")
        self._format = format
        self.ends = frozenset({self.tokenizer.eos_id, *config.eos_token_ids})
        kept = E4M3 if cache_dtype == "fp8" else cache_dtype
        decode = partial(self.tokenizer.decode, skip_special=True)
        guides = GuidesOnDemand(self.tokenizer, config.vocab_size, self.ends)
        self.rollout = EngineRollout(self.model, decode, kept, cache_bytes, speculative_tokens, requests, guides=guides)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the cache, and end the threads and processes that guides have started. A later call begins anew."""
        self.rollout.close()

    @property
    def format(self) -> str:
        """The chat format. Raises UserError for a model without chat tokens."""
        return detect_format(self.tokenizer) if self._format == "auto" else self._format

    # Texts ------------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_token: Callable[[Token], None] | None = None,
    ) -> list[Generated]:
        """Go on with texts (which begin a document) or token ids; all of them together, in their order."""
        listed: Sequence[str | list[int]] = [prompts] if isinstance(prompts, str) else prompts
        ids = [
            [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
            for prompt in listed
        ]
        chosen = self._params(params, len(ids), self.ends)
        completions = self.rollout.generate(ids, chosen, on_token)
        return [
            Generated(self._text(completion, one), completion)
            for completion, one in zip(completions, chosen, strict=True)
        ]

    def _params(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int, ends: frozenset[int]
    ) -> list[SamplingParams]:
        given = params or SamplingParams()
        chosen = [given] * count if isinstance(given, SamplingParams) else list(given)
        return [
            one if one.ignore_eos else replace(one, stop_token_ids=tuple(sorted({*one.stop_token_ids, *ends})))
            for one in chosen
        ]

    def _text(self, completion: Completion, params: SamplingParams) -> str:
        stream = TextStream(self.tokenizer, params.stop, self.ends)
        return "".join(map(stream.push, completion.token_ids)) + stream.finish()

    # Chats ------------------------------------------------------------------------------------------------------------

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        verify: int = 1,
    ) -> list[ChatReply]:
        """Replies to one conversation (a list of messages) or to several.

        verify: draw so many replies to each, with seeds that follow each other, and take the one whose final answer
        most of them give (self-consistency); its `verdict` says how many agreed. A guide holds for what is said behind
        the thought.
        """
        if verify < 1:
            raise UserError("verify is how many replies are drawn: 1 or more")
        several = [conversations] if conversations and isinstance(conversations[0], Mapping) else conversations
        format, given = self.format, params or SamplingParams()
        ids = [
            self.tokenizer.encode_segments(encode_chat(conversation, format, tools, thinking))  # type: ignore[arg-type]
            for conversation in several
        ]
        ends = self.ends | {self.tokenizer.special_id(stop_token(format))}
        seeds = [given.seed if given.seed is None else given.seed + i for i in range(verify)]
        each = self._params([replace(given, seed=seed) for seed in seeds], verify, ends)
        chosen = [self._guided(one, prompt) for prompt in ids for one in each]
        completions = self.rollout.generate([prompt for prompt in ids for _ in each], chosen)
        replies = [self._reply(completion, format, bool(tools), given, ends) for completion in completions]
        groups = [replies[start : start + verify] for start in range(0, len(replies), verify)]
        return [self._voted(group) if verify > 1 else group[0] for group in groups]

    def _guided(self, params: SamplingParams, prompt: Sequence[int]) -> SamplingParams:
        if params.guide is None:
            return params
        thinks = opens_reasoning(self.tokenizer, prompt)
        return replace(params, guide=replace(params.guide, after_thinking=thinks))

    def _reply(
        self, completion: Completion, format: str, tools: bool, params: SamplingParams, ends: frozenset[int]
    ) -> ChatReply:
        thinks = opens_reasoning(self.tokenizer, completion.prompt_ids)
        stream = ReplyStream(self.tokenizer, format, thinks, tools, params.stop, ends)
        parts = ReplyParts()
        for token in completion.token_ids:
            parts.add(stream.push(token))
        parts.add(stream.finish())
        calls = [
            {
                "id": call.id or f"call_{completion.seed:x}_{index}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for index, call in enumerate(parts.calls)
        ]
        finish = "tool_calls" if calls and completion.finish_reason == "stop" else completion.finish_reason
        return ChatReply(parts.content, parts.reasoning, calls, finish, completion)

    def _voted(self, replies: Sequence[ChatReply]) -> ChatReply:
        winner, verdict = decide([reply.content for reply in replies])
        return replace(replies[winner], verdict=verdict)

    # Weights ----------------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Free the cache, and on a device the weights' memory, until `wake`."""
        self.rollout.sleep()

    def wake(self) -> None:
        self.rollout.wake()

    def update_weights(self, weights: Mapping[str, Tensor], version: int | None = None) -> int:
        """Write new values into the model's parameters and buffers, named as in its `state_dict`, all or some; nothing
        that was computed with the old ones is used again. Returns the version that later completions carry.

        Raises UserError, before anything is written, for unknown names, other shapes, and real numbers where the model
        has FP8 ones (or the reverse), which would need other scales.
        """
        own = self.model.state_dict()
        for name, tensor in weights.items():
            if name not in own:
                raise UserError(f"update_weights: the model has no {name!r}")
            if own[name].shape != tensor.shape:
                raise UserError(
                    f"update_weights: {name!r} is {list(tensor.shape)}, and the model's {list(own[name].shape)}"
                )
            if own[name].dtype != tensor.dtype and 1 in (own[name].itemsize, tensor.itemsize):
                raise UserError(f"update_weights: {name!r} is {tensor.dtype}, and the model's {own[name].dtype}")
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)
        if version is not None:
            self.rollout.weight_version = version - 1
        return self.rollout.weights_changed()
