"""POST /tokenize and /detokenize."""

from .completions import text_ids
from .conversation import chat_prompt
from .errors import BadRequest
from .exchange import Call
from .protocol import DetokenizeRequest, TokenizeRequest
from .responses import Detokenized, Tokenized
from .validation import decode


async def tokenize(call: Call) -> None:
    service, request = call.service, decode(call.body, TokenizeRequest)
    service.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise BadRequest("give either prompt or messages", "prompt", "invalid_value")
    if request.prompt is not None:
        prompts = [request.prompt]
        (ids,) = await text_ids(service, call.tenant, prompts, request.add_special_tokens, request.parse_special)
    else:
        ids = (await chat_prompt(service, call.tenant, request, request.tools or [])).ids
    await call.answer(Tokenized(len(ids), service.window, ids))


async def detokenize(call: Call) -> None:
    service, request = call.service, decode(call.body, DetokenizeRequest)
    service.check_model(request.model)
    if any(token >= service.client.info.vocab_size for token in request.tokens):
        text = f"tokens has an id beyond the model's {service.client.info.vocab_size} tokens"
        raise BadRequest(text, "tokens", "invalid_value")
    await call.answer(Detokenized(service.tokenizer.decode(request.tokens)))
