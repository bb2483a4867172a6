"""POST /v1/chat/completions."""

import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import replace

from ...core.sampling_params import SamplingParams
from ..verify import decide
from .chat_reply import ChatReply
from .conversation import ChatPrompt, chat_prompt, chosen_tools, offered_tools
from .counting import usage
from .errors import BadRequest
from .exchange import KEEP_ALIVE, Call, event
from .generation import Generation, Job
from .guide import guide_of, tools_guide
from .protocol import ChatRequest, ChatTool, StreamOptions
from .responses import ChatChunk, ChatCompletion, ChunkChoice, Usage
from .sampling import sampling_params, with_seed
from .service import Service
from .validation import decode


async def create_chat(call: Call) -> None:
    service, request = call.service, decode(call.body, ChatRequest)
    service.check_model(request.model)
    _check(request, service)
    tools = offered_tools(request, service.settings.format or "")
    prompt = await chat_prompt(service, call.tenant, request, tools)
    params = _params(service, request, prompt, tools)
    samples = request.verify or request.n or 1
    jobs = [Job(prompt.ids, with_seed(params, number)) for number in range(samples)]
    asked = (request.top_logprobs or 0) if request.logprobs else None
    one_call = request.parallel_tool_calls is False
    replies = [ChatReply(service, prompt, index, params.stop, bool(tools), one_call, asked) for index in range(samples)]
    answer = _Answer(service, request, prompt, replies)
    async with Generation(service, call.tenant, jobs, whole=not request.stream) as generation:
        await generation.first()
        if request.stream:
            await call.stream(answer.frames(generation))
        else:
            await call.answer(await answer.whole(generation))


def _check(request: ChatRequest, service: Service) -> None:
    if request.top_logprobs and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs", "invalid_value")
    if request.verify is None:
        return
    if request.verify > service.settings.max_verify:
        raise BadRequest(f"verify may be {service.settings.max_verify} at most", "verify", "invalid_value")
    for name, given in (("n", (request.n or 1) > 1), ("stream", request.stream), ("tools", request.tools)):
        if given:
            raise BadRequest(f"verify decides between whole answers; it does not go with {name}", name, "invalid_value")


def _params(service: Service, request: ChatRequest, prompt: ChatPrompt, tools: list[ChatTool]) -> SamplingParams:
    most, format = service.settings.max_guide, service.settings.format or ""
    guide, must = guide_of(request, most), chosen_tools(request, tools)
    if guide is not None and tools:
        text = "a form of the text and tools exclude each other; leave one out, or set tool_choice to none"
        raise BadRequest(text, "tools", "invalid_value")
    if must:
        guide = tools_guide(must, format, prompt.reasoning, most)
    elif guide is not None:
        guide = replace(guide, after_thinking=prompt.reasoning)
    limit = request.max_completion_tokens or request.max_tokens
    params = sampling_params(service, request, len(prompt.ids), limit, guide, request.top_logprobs)
    end = service.chat_end
    if end is None or end == service.tokenizer.eos_id or request.ignore_eos:
        return params
    return replace(params, stop_token_ids=(*params.stop_token_ids, end))


class _Answer:
    """The answer to one request, from the outputs of its choices."""

    def __init__(self, service: Service, request: ChatRequest, prompt: ChatPrompt, replies: list[ChatReply]) -> None:
        self._service, self._request, self._prompt, self._replies = service, request, prompt, replies
        self._id, self._created = f"chatcmpl-{secrets.token_hex(16)}", int(time.time())
        self._model = request.model or service.model

    async def whole(self, generation: Generation) -> ChatCompletion:
        async for item in generation:
            if item is not None:
                index, output = item
                self._replies[index].push(output)
        service = self._service
        choices = [reply.choice() for reply in self._replies]
        completion = ChatCompletion(
            self._id, "chat.completion", self._created, self._model, service.fingerprint, choices, self._usage()
        )
        if self._request.verify is not None:
            best, completion.verification = decide([reply.parts.content for reply in self._replies])
            completion.choices = [choices[best]]
            completion.choices[0].index = 0
        return completion

    async def frames(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        options = self._request.stream_options or StreamOptions()
        continuous, at_end = bool(options.continuous_usage_stats), bool(options.include_usage)
        for reply in self._replies:
            yield self._chunk([reply.opening()], continuous, at_end)
        async for item in generation:
            if item is None:
                yield KEEP_ALIVE
                continue
            index, output = item
            for choice in self._replies[index].push(output):
                yield self._chunk([choice], continuous, at_end)
        if at_end:
            yield self._chunk([], True, True)

    def _chunk(self, choices: list[ChunkChoice], counted: bool, announced: bool) -> bytes:
        """announced: there will be a usage at the end; until then it is null."""
        chunk = ChatChunk(
            self._id, "chat.completion.chunk", self._created, self._model, self._service.fingerprint, choices
        )
        if counted:
            chunk.usage = self._usage()
        elif announced:
            chunk.usage = None
        return event(chunk)

    def _usage(self) -> Usage:
        """The prompt counts once, however many choices there are; what was found of it in the cache is the first's."""
        replies = self._replies
        return usage(
            len(self._prompt.ids),
            sum(reply.tokens for reply in replies),
            replies[0].cached,
            sum(reply.reasoning_tokens for reply in replies),
        )
