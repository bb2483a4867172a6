"""How likely a model finds a text behind another one: what few-shot multiple choice and bits per byte are made of.

Requests that begin alike, as all questions behind the same five shots do, compute their common beginning once: it is
kept in pages of the latent cache, which later requests read. A pass takes many requests at a time; those whose
beginning is being computed by another one of the same pass wait for the next.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.cache import PagedCache
from ..core.model import DeepseekV3
from ..core.step import packed
from ..errors import UserError
from ..ops.cache_layout import cache_layout

PASS_TOKENS = 4096  # new tokens of a pass
GATHERED_TOKENS = 32768  # tokens of a pass, those read from the cache included: their keys and values are expanded
CACHED_TOKENS = 65536  # in the pages of a window of requests
LOGITS = 2**25  # computed at a time: 128 MiB in float32


@dataclass(frozen=True)
class Request:
    """continuation: what is scored, behind context; both ids, neither empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """logprob: natural logarithm of the continuation's probability. greedy: each of its tokens is the likeliest."""

    logprob: float
    greedy: bool


@dataclass
class _Sequence:
    """Tokens to run, and the requests that read their scores off it: all with the same context and the same tokens."""

    tokens: tuple[int, ...]
    first: int  # position whose hidden state predicts the first token of the continuation
    requests: list[int]
    pages: list[int] = field(default_factory=list)
    shared: int = 0  # how many of the pages other sequences may read


class Likelihood:
    """Scores requests under `model`. computed: tokens that went through the model so far."""

    def __init__(
        self,
        model: DeepseekV3,
        pass_tokens: int = PASS_TOKENS,
        cached_tokens: int = CACHED_TOKENS,
    ) -> None:
        self.model, self.pass_tokens, self.cached_tokens = model, pass_tokens, cached_tokens
        self.context = model.config.max_position_embeddings
        self.computed = 0

    def score(self, requests: Sequence[Request], on_score: Callable[[int, Score], None] | None = None) -> list[Score]:
        """A score for each request, in their order; `on_score` hears of each when it is there.

        Raises UserError for a request that is longer than the model's context.
        """
        scores: dict[int, Score] = {}
        with torch.inference_mode():
            for window in self._windows(_sequences(requests, self.context)):
                for sequence, hidden in self._run(window):
                    for index, score in self._read(sequence, hidden, requests):
                        scores[index] = score
                        if on_score is not None:
                            on_score(index, score)
        return [scores[index] for index in range(len(requests))]

    # From sequences to hidden states.

    def _windows(self, sequences: list[_Sequence]) -> Iterator[tuple[list[_Sequence], PagedCache]]:
        """Neighbours whose pages fit into a cache together, and the cache. Sorted, so what begins alike is near."""
        embedding = self.model.model.embed_tokens.weight
        layout = cache_layout(self.model.config, embedding.dtype)
        size = layout.page_size
        rest = sorted(sequences, key=lambda sequence: sequence.tokens)
        while rest:
            window: list[_Sequence] = []
            pages: dict[tuple[int, tuple[int, ...]], int] = {}  # (page before it, its tokens) -> a page that is shared
            used = 0
            for sequence in rest:
                # Pages that end before `first` hold nothing that must be computed for this sequence's own sake.
                chunks = [sequence.tokens[i : i + size] for i in range(0, sequence.first // size * size, size)]
                own = -(-len(sequence.tokens) // size) - len(chunks)
                before, chain, fresh = -1, list[int](), 0
                for chunk in chunks:
                    page = pages.get((before, chunk), used + fresh)
                    fresh += page == used + fresh
                    chain.append(page)
                    before = page
                if window and (used + fresh + own) * size > self.cached_tokens:
                    break
                for before, page, chunk in zip([-1, *chain], chain, chunks, strict=False):
                    pages[before, chunk] = page
                used += fresh
                sequence.pages, sequence.shared = [*chain, *range(used, used + own)], len(chain)
                used += own
                window.append(sequence)
            rest = rest[len(window) :]
            yield window, PagedCache(self.model.config, used, embedding.dtype, embedding.device, layout)

    def _run(self, window: tuple[list[_Sequence], PagedCache]) -> Iterator[tuple[_Sequence, Tensor]]:
        """Each sequence with its hidden states [len - first, D], from the one that predicts the continuation."""
        waiting, cache = window
        ready: set[int] = set()
        while waiting:
            batch: list[tuple[_Sequence, int]] = []  # with the tokens that the cache holds already
            claimed: set[int] = set()
            new = gathered = 0
            later = []
            for sequence in waiting:
                pages = sequence.pages[: sequence.shared]
                missing = next((i for i, page in enumerate(pages) if page not in ready), len(pages))
                known = missing * cache.page_size
                length = len(sequence.tokens)
                full = new + length - known > self.pass_tokens or gathered + length > GATHERED_TOKENS
                if (batch and full) or not claimed.isdisjoint(pages[missing:]):
                    later.append(sequence)
                    continue
                batch.append((sequence, known))
                claimed.update(pages[missing:])
                new, gathered = new + length - known, gathered + length
            yield from zip([sequence for sequence, _ in batch], self._forward(batch, cache), strict=True)
            ready |= claimed
            waiting = later

    def _forward(self, batch: list[tuple[_Sequence, int]], cache: PagedCache) -> list[Tensor]:
        if len(batch) == 1:
            sequence, known = batch[0]
            while len(sequence.tokens) - known > self.pass_tokens and known + self.pass_tokens <= sequence.first:
                self._pass(cache, [sequence], [known], [known + self.pass_tokens])
                known += self.pass_tokens
            batch = [(sequence, known)]
        sequences, starts = [sequence for sequence, _ in batch], [known for _, known in batch]
        hidden = self._pass(cache, sequences, starts, [len(sequence.tokens) for sequence in sequences])
        return [rows[sequence.first - known :] for rows, sequence, known in zip(hidden, sequences, starts, strict=True)]

    def _pass(
        self, cache: PagedCache, sequences: list[_Sequence], starts: list[int], ends: list[int]
    ) -> tuple[Tensor, ...]:
        """Run the tokens from `starts` to `ends` -> their hidden states, by sequence."""
        device = cache.device
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        tokens = [t for s, start, end in zip(sequences, starts, ends, strict=True) for t in s.tokens[start:end]]
        step = cache.step([sequence.pages for sequence in sequences], starts, lengths, absorbed=False)
        positions, cu_seqlens, _ = packed(lengths, starts, device)
        flat = torch.tensor(tokens, device=device)
        self.computed += len(tokens)
        return self.model(flat, cu_seqlens, step, positions=positions, logits="none").hidden.split(lengths)

    # From hidden states to scores.

    def _read(self, sequence: _Sequence, hidden: Tensor, requests: Sequence[Request]) -> Iterator[tuple[int, Score]]:
        """hidden [N, D], N = length of the continuations."""
        targets = torch.tensor([requests[i].continuation for i in sequence.requests], device=hidden.device)  # [R, N]
        logprobs = torch.zeros(len(targets), dtype=torch.float64, device=hidden.device)
        greedy = torch.ones(len(targets), dtype=torch.bool, device=hidden.device)
        rows = max(1, LOGITS // self.model.config.vocab_size)
        for start in range(0, len(hidden), rows):
            logits = self.model.head(hidden[start : start + rows]).float()  # [n, V]
            wanted = targets[:, start : start + rows].T  # [n, R]
            picked = logits.gather(1, wanted) - logits.logsumexp(-1, keepdim=True)
            logprobs += picked.double().sum(0)
            greedy &= (logits.argmax(-1, keepdim=True) == wanted).all(0)
        for index, logprob, best in zip(sequence.requests, logprobs.tolist(), greedy.tolist(), strict=True):
            yield index, Score(logprob, best)


def _sequences(requests: Sequence[Request], context: int) -> list[_Sequence]:
    """The different runs that the requests take: the letters of one question need only one."""
    found: dict[tuple[tuple[int, ...], int], _Sequence] = {}
    for index, request in enumerate(requests):
        if not request.context or not request.continuation:
            raise UserError("a likelihood needs a context and a continuation of one token at least")
        tokens, first = request.context + request.continuation[:-1], len(request.context) - 1
        if len(tokens) > context:
            raise UserError(f"a text of {len(tokens)} tokens exceeds the model's context of {context}; shorten it")
        found.setdefault((tokens, first), _Sequence(tokens, first, [])).requests.append(index)
    return list(found.values())


def windows(tokens: Sequence[int], start: int, length: int, overlap: int) -> Iterator[Request]:
    """Requests that together score every token of a text once.

    start: the token in front of the text (beginning of sentence). length: most tokens of a request, context included.
    overlap: how many tokens of context every window behind the first has at least; the last one has more, as far as
    there is room: its tokens cost nothing there.
    """
    if not 1 <= overlap < length:
        raise UserError(f"windows of {length} tokens cannot have {overlap} of context; give 1 to {length - 1}")
    text = (start, *tokens)
    done = 1
    while done < len(text):
        # A window of `length` inputs predicts the token behind its last one too.
        begin = 0 if done == 1 else min(done - overlap, max(0, len(text) - 1 - length))
        end = min(len(text), begin + length + 1)
        yield Request(text[begin:done], text[done:end])
        done = end
