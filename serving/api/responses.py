"""What clients get. A field of `UNSET` is left out; one of None is null."""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from ..verify import Verification

FinishReason = Literal["stop", "length", "tool_calls", "insufficient_system_resource"]


class PromptDetails(Struct):
    cached_tokens: int = 0


class CompletionDetails(Struct):
    reasoning_tokens: int = 0


class Usage(Struct):
    """Tokens, as OpenAI and as DeepSeek spell them. Hits were found in the prefix cache, misses computed."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int


class TopLogprob(Struct):
    """bytes: of the token, which may be part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """Of every generated token, control tokens included, under the model itself."""

    content: list[TokenLogprob]


class CalledFunction(Struct):
    """arguments: JSON text, unless the completion broke off in it."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCall(Struct):
    """complete: false where the text ended inside the call."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    complete: bool | UnsetType = UNSET


class ToolCallDelta(Struct):
    """The first of a call has id, type and the function's name; the next ones add to its arguments."""

    index: int
    function: CalledFunction | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    complete: bool | UnsetType = UNSET


class Message(Struct):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class Delta(Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChoice(Struct):
    """stop_reason: the stop string or token id that ended the text. seed: gives this choice again."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    seed: int


class ChunkChoice(Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    seed: int | UnsetType = UNSET


class ChatCompletion(Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    verification: Verification | UnsetType = UNSET


class ChatChunk(Struct):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class TextLogprobs(Struct):
    """text_offset: where in `text` each token begins. The first token of a prompt has no log-probability."""

    text_offset: list[int]
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class TextChoice(Struct):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    seed: int | UnsetType = UNSET


class TextCompletion(Struct):
    """A whole completion, or a chunk of one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET


class Model(Struct):
    """root: the model's own name. max_model_len: tokens of prompt and completion together."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(Struct):
    object: Literal["list"]
    data: list[Model]


class Tokenized(Struct):
    count: int
    max_model_len: int
    tokens: list[int]


class Detokenized(Struct):
    prompt: str


class Status(Struct):
    status: Literal["ok", "engine_dead", "draining", "queue_full"]


class Version(Struct):
    version: str
