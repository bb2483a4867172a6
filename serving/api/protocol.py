"""What clients send. Types and ranges are checked while a request is decoded; OpenAPI is made from the same structs.

Fields that nobody here knows are ignored, as clients send many; those which would change the answer and are not
supported are refused by name (`UNSUPPORTED` in validation.py). A null is a field left out.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

MOST_CHOICES, MOST_STOPS, MOST_TOP_LOGPROBS, MOST_BIASES, MOST_TOOLS = 64, 16, 20, 1024, 128

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Stop = Annotated[str, Meta(min_length=1, max_length=1024)]
Stops = Annotated[list[Stop], Meta(max_length=MOST_STOPS)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


class StreamOptions(Struct):
    """include_usage: a last chunk with the usage. continuous_usage_stats: the usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputs(Struct):
    """What the text must look like; one of them."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Annotated[list[Stop], Meta(min_length=1, max_length=1024)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class FormatText(Struct, tag="text"):
    """Any text."""


class FormatJsonObject(Struct, tag="json_object"):
    """One JSON object."""


class JsonSchema(Struct):
    """schema: JSON that fits it; without one, any JSON object. The name is for the sender."""

    schema: dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class FormatJsonSchema(Struct, tag="json_schema"):
    """JSON of a given schema."""

    json_schema: JsonSchema


ResponseFormat = FormatText | FormatJsonObject | FormatJsonSchema


class Sampling(Struct, kw_only=True):
    """How tokens are chosen and what is told about them, in chats and plain completions alike."""

    model: Name | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=MOST_BIASES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[Stop], Meta(min_length=1, max_length=1024)] | None = None
    guided_grammar: str | None = None


class Part(Struct):
    """A part of a message's content. Only text is read here."""

    type: Name
    text: str | None = None


class CalledFunction(Struct):
    """arguments: JSON text."""

    name: Annotated[str, Meta(max_length=256)]
    arguments: str | dict[str, Any] | None = None


class SentCall(Struct):
    """A call of the assistant in an earlier turn."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] | None = None


class ChatMessage(Struct):
    """One message. prefix: go on with this last message of the assistant. reasoning_content, reasoning: what the
    assistant thought; formats that do not repeat it to the model leave it out."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: Annotated[list[SentCall], Meta(max_length=MOST_TOOLS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    prefix: bool | None = None


class Function(Struct):
    """parameters: the JSON schema of the arguments."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(Struct):
    type: Literal["function"]
    function: Function


class ChosenFunction(Struct):
    name: Annotated[str, Meta(max_length=256)]


class NamedChoice(Struct):
    """Call this function."""

    type: Literal["function"]
    function: ChosenFunction


class Thinking(Struct):
    """Whether to reason before the answer, as DeepSeek's own interface says it."""

    type: Literal["enabled", "disabled"]


class TemplateArguments(Struct):
    """Whether to reason before the answer, as other servers say it."""

    thinking: bool | None = None
    enable_thinking: bool | None = None


class ChatRequest(Sampling, kw_only=True):
    """A chat. `verify` draws so many answers, of which the majority's is returned."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=65536)]
    max_completion_tokens: Count | None = None
    tools: Annotated[list[ChatTool], Meta(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: TemplateArguments | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    verify: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None


PROMPTS = {
    "type": "array",
    "minItems": 1,
    "anyOf": [
        {"items": {"type": "string"}},
        {"items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}},
        {
            "items": {
                "type": "array",
                "minItems": 1,
                "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
            }
        },
    ],
}
Prompts = Annotated[
    list[str | TokenId | Annotated[list[TokenId], Meta(min_length=1)]],
    Meta(min_length=1, extra_json_schema=PROMPTS),
]


class CompletionRequest(Sampling, kw_only=True):
    """A text to go on with: a string, token ids, or a list of either; with `suffix`, the gap between both is filled.

    add_special_tokens: begin with the begin token where the prompt is text. parse_special: control tokens spelt out in
    the prompt become control tokens; for programs that write prompts, never for text of people.
    """

    prompt: str | Prompts
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None


class TokenizeRequest(Struct, kw_only=True):
    """A text or a chat, to be turned into tokens."""

    model: Name | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=65536)] | None = None
    tools: Annotated[list[ChatTool], Meta(max_length=MOST_TOOLS)] | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: TemplateArguments | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class DetokenizeRequest(Struct, kw_only=True):
    """Tokens to be turned into text."""

    tokens: list[TokenId]
    model: Name | None = None


AnyRequest = ChatRequest | CompletionRequest | TokenizeRequest | DetokenizeRequest
