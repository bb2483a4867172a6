"""From what a request says about choosing tokens to what the engine is told."""

from dataclasses import replace

from ...core.sampling_params import Guide, SamplingParams
from .errors import BadRequest
from .guide import guide_of
from .protocol import Sampling
from .service import Service

SEEDS = 2**64


def sampling_params(
    service: Service,
    request: Sampling,
    prompt_tokens: int,
    max_tokens: int | None,
    guide: Guide | None = None,
    top_logprobs: int | None = None,
    prompt_logprobs: bool = False,
) -> SamplingParams:
    """Raises BadRequest for a prompt that leaves no room, and for token ids that the model does not have.

    guide: of tools; without one, the request's own fields may ask for a form of the text.
    """
    settings = service.settings
    room = service.window - prompt_tokens
    if (max_tokens is not None and max_tokens > room) or room < 1:
        wanted = f" and max_tokens {max_tokens}" if max_tokens is not None else ""
        raise BadRequest(
            f"the prompt has {prompt_tokens} tokens; with it{wanted} more than the {service.window} tokens that this "
            "server holds for one request would be needed",
            "max_tokens" if room >= 1 else None,
            "context_length_exceeded",
        )
    biases, ends = request.logit_bias or {}, request.stop_token_ids or []
    for field, ids in (("logit_bias", biases), ("stop_token_ids", ends)):
        if any(token >= service.client.info.vocab_size for token in ids):
            text = f"{field} has a token id beyond the model's {service.client.info.vocab_size} tokens"
            raise BadRequest(text, field, "invalid_value")
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    top_k = request.top_k or 0
    return SamplingParams(
        temperature=settings.temperature if request.temperature is None else request.temperature,
        top_k=min(max(top_k, 0), service.client.info.vocab_size),
        top_p=settings.top_p if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        seed=request.seed,
        max_tokens=room if max_tokens is None else max_tokens,
        stop=tuple(stop),
        stop_token_ids=tuple(ends),
        ignore_eos=bool(request.ignore_eos),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        logit_bias=biases,
        top_logprobs=min(top_logprobs or 0, service.client.info.vocab_size),
        prompt_logprobs=prompt_logprobs,
        guide=guide if guide is not None else guide_of(request, settings.max_guide),
    )


def with_seed(params: SamplingParams, number: int) -> SamplingParams:
    """Of the choice `number` (0, 1, ...): seeds follow each other, within 64 bits. Without one, the engine draws."""
    if params.seed is None:
        return params
    return replace(params, seed=(params.seed + number + SEEDS // 2) % SEEDS - SEEDS // 2)
