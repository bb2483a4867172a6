"""POST /v1/completions: texts to go on with, as strings or token ids, and gaps to be filled."""

import secrets
import time
from collections.abc import AsyncGenerator

from ...core.encoding import encode_fim
from ...core.special_tokens import Segment
from ...errors import UserError
from .auth import Tenant
from .counting import usage
from .errors import BadRequest
from .exchange import KEEP_ALIVE, Call, event
from .generation import Generation, Job
from .protocol import CompletionRequest, StreamOptions
from .responses import TextChoice, TextCompletion, Usage
from .sampling import sampling_params, with_seed
from .service import Service
from .text_reply import TextReply
from .validation import decode


async def create_completion(call: Call) -> None:
    service, request = call.service, decode(call.body, CompletionRequest)
    service.check_model(request.model)
    prompts = await _prompts(service, call.tenant, request)
    choices = request.n or 1
    if len(prompts) * choices > service.settings.max_prompts:
        text = f"one request may ask for {service.settings.max_prompts} texts; send several requests"
        raise BadRequest(text, "n" if choices > 1 else "prompt", "invalid_value")
    echo = bool(request.echo)
    jobs, replies = list[Job](), list[TextReply]()
    for prompt in prompts:
        params = sampling_params(
            service,
            request,
            len(prompt),
            request.max_tokens,
            top_logprobs=request.logprobs,
            prompt_logprobs=echo and request.logprobs is not None,
        )
        for number in range(choices):
            replies.append(TextReply(service, prompt, len(jobs), params.stop, echo, request.logprobs))
            jobs.append(Job(prompt, with_seed(params, number)))
    answer = _Answer(service, request, prompts, replies)
    async with Generation(service, call.tenant, jobs, whole=not request.stream) as generation:
        await generation.first()
        if request.stream:
            await call.stream(answer.frames(generation))
        else:
            await call.answer(await answer.whole(generation))


async def _prompts(service: Service, tenant: Tenant, request: CompletionRequest) -> list[list[int]]:
    """Token ids of every prompt. Raises BadRequest."""
    given = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    texts = [prompt for prompt in given if isinstance(prompt, str)]
    if len(texts) == len(given):
        if len(given) > service.settings.max_prompts:
            text = f"one request may have {service.settings.max_prompts} prompts; send several requests"
            raise BadRequest(text, "prompt", "invalid_value")
        if request.suffix:
            return [await _gap(service, tenant, request, texts, request.suffix)]
        return await text_ids(service, tenant, texts, request.add_special_tokens, request.parse_special)
    if request.suffix:
        raise BadRequest("suffix goes with one prompt, of text", "suffix", "invalid_value")
    numbers = [prompt for prompt in given if isinstance(prompt, int)]
    lists = [prompt for prompt in given if isinstance(prompt, list)]
    if (numbers and len(numbers) < len(given)) or texts:
        raise BadRequest("prompt mixes texts, token ids and lists; give one kind", "prompt", "invalid_value")
    prompts = [numbers] if numbers else lists
    if any(token >= service.client.info.vocab_size for ids in prompts for token in ids):
        text = f"prompt has a token id beyond the model's {service.client.info.vocab_size} tokens"
        raise BadRequest(text, "prompt", "invalid_value")
    return prompts


async def text_ids(
    service: Service, tenant: Tenant, texts: list[str], add_special: bool | None, parse_special: bool | None
) -> list[list[int]]:
    """Ids of prompts of text, behind the begin token unless add_special is false."""
    tokenizer = service.tokenizer
    segments: list[list[Segment]] = [tokenizer.segments(text) if parse_special else [text] for text in texts]
    begin = [tokenizer.bos_id] if add_special is not False else []
    prompts = [begin + ids for ids in await service.encode(tenant, *segments)]
    if not all(prompts):
        raise BadRequest("the prompt has no tokens", "prompt", "invalid_value")
    return prompts


async def _gap(
    service: Service, tenant: Tenant, request: CompletionRequest, texts: list[str], suffix: str
) -> list[int]:
    if len(texts) != 1 or request.echo:
        raise BadRequest("suffix goes with one prompt, of text, and not with echo", "suffix", "invalid_value")
    try:
        (ids,) = await service.encode(tenant, encode_fim(texts[0], suffix))
    except UserError:
        raise BadRequest("this model cannot fill gaps", "suffix", "unsupported_parameter") from None
    return [service.tokenizer.bos_id, *ids]


class _Answer:
    """The answer to one request, from the outputs of its choices."""

    def __init__(
        self, service: Service, request: CompletionRequest, prompts: list[list[int]], replies: list[TextReply]
    ) -> None:
        self._service, self._request, self._replies = service, request, replies
        self._prompt_tokens, self._choices = sum(map(len, prompts)), len(replies) // len(prompts)
        self._id, self._created = f"cmpl-{secrets.token_hex(16)}", int(time.time())
        self._model = request.model or service.model

    async def whole(self, generation: Generation) -> TextCompletion:
        async for item in generation:
            if item is not None:
                index, output = item
                self._replies[index].push(output)
        completion = self._completion([reply.choice() for reply in self._replies])
        completion.usage = self._usage()
        return completion

    async def frames(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        options = self._request.stream_options or StreamOptions()
        async for item in generation:
            if item is None:
                yield KEEP_ALIVE
                continue
            index, output = item
            for choice in self._replies[index].push(output):
                chunk = self._completion([choice])
                if options.continuous_usage_stats:
                    chunk.usage = self._usage()
                elif options.include_usage:
                    chunk.usage = None
                yield event(chunk)
        if options.include_usage:
            last = self._completion([])
            last.usage = self._usage()
            yield event(last)

    def _completion(self, choices: list[TextChoice]) -> TextCompletion:
        return TextCompletion(
            self._id, "text_completion", self._created, self._model, self._service.fingerprint, choices
        )

    def _usage(self) -> Usage:
        """Every prompt counts once, however many choices it has; what was found in the cache is its first choice's."""
        cached = sum(reply.cached for reply in self._replies[:: self._choices])
        return usage(self._prompt_tokens, sum(reply.tokens for reply in self._replies), cached)
