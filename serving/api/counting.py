"""Tokens of an answer: how many there were, which they were, and how likely."""

from ...core.tokenizer import Tokenizer
from ..messages import Output, TopLogprobs
from .responses import CompletionDetails, PromptDetails, TokenLogprob, TopLogprob, Usage

LEAST_LOGPROB = -9999.0  # JSON has no infinity; clients know this number


def usage(prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> Usage:
    """Token counts in every spelling. cached: of the prompt; reasoning: of the completion."""
    return Usage(
        prompt,
        completion,
        prompt + completion,
        PromptDetails(cached),
        CompletionDetails(reasoning),
        prompt_cache_hit_tokens=cached,
        prompt_cache_miss_tokens=prompt - cached,
    )


def text_tokens(output: Output) -> list[int]:
    """The tokens of an output without the one that ended the text, if one did."""
    ended = output.finish == "stop" and not isinstance(output.stop_reason, str)
    return output.tokens[:-1] if ended else output.tokens


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def token_logprobs(tokenizer: Tokenizer, output: Output, asked: int) -> list[TokenLogprob]:
    """Of every token of an output, in OpenAI's form for chats. asked: so many of the likeliest tokens with each."""
    tops = output.top if asked else [[] for _ in output.tokens]
    return [
        TokenLogprob(
            token=tokenizer.decode([token]),
            logprob=finite(logprob),
            bytes=list(tokenizer.token_bytes(token)),
            top_logprobs=[
                TopLogprob(tokenizer.decode([other]), finite(value), list(tokenizer.token_bytes(other)))
                for other, value in top[:asked]
            ],
        )
        for token, logprob, top in zip(output.tokens, output.logprobs, tops, strict=True)
    ]


def spelt(tokenizer: Tokenizer, token: int) -> str:
    """A token as a string of its own; one that is not whole UTF-8 as `bytes:\\xe4\\xb8`, so that no two look alike."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def top_by_text(tokenizer: Tokenizer, token: int, logprob: float, top: TopLogprobs, asked: int) -> dict[str, float]:
    """The `asked` likeliest tokens, and the chosen one, by their text: OpenAI's form for plain completions."""
    table = {spelt(tokenizer, other): finite(value) for other, value in top[:asked]}
    return {**table, spelt(tokenizer, token): finite(logprob)}
