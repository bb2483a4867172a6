"""A model as lm-eval sees it: likelihoods by our batched code, replies by our completers, each kept as it comes."""

import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..core.completer import Reply
from ..core.endpoint import Endpoint
from ..core.generate import SamplingParams
from ..errors import UserError
from .asking import Unfinished
from .clock import Clock
from .likelihood import Request, Score
from .published import LM
from .store import Key, Store, digest, seed_of
from .subject import NO_TEXTS, LocalSubject, Progress, Subject, cut

REPLY = 256  # tokens of a reply where a task does not say, as in lm-eval's own models
NO_LIKELIHOODS = "compares likelihoods, which {} cannot tell; base models are asked such tasks"


class Account:
    """What the answers of a task took, those included that an earlier run has kept.

    settings: what decides an answer besides the question. lengths: tokens of every reply. cut_off: replies that ended
    at a limit. shortened: prompts that lost their beginning. unasked: questions longer than the context.
    refused: questions that a server would not take.
    """

    def __init__(self, settings: dict[str, Any] | None = None) -> None:
        self.settings = settings or {}
        self.seconds = 0.0
        self.tokens = self.cut_off = self.shortened = self.unasked = self.refused = 0
        self.lengths: list[int] = []

    def add(self, row: dict[str, Any]) -> None:
        self.seconds += row["seconds"]
        self.tokens += row["tokens"]
        if row.get("unasked"):
            self.unasked += 1
        elif "text" in row:
            self.lengths.append(row["tokens"])
            self.cut_off += row["finish_reason"] == "length"

    def join(self, others: Sequence["Account"]) -> None:
        """Add what other processes did at the same time."""
        for other in others:
            self.seconds = max(self.seconds, other.seconds)
            self.tokens += other.tokens
            self.lengths += other.lengths
            self.cut_off += other.cut_off
            self.shortened += other.shortened
            self.unasked += other.unasked
            self.refused += other.refused


@functools.cache
def model_class() -> Any:
    """The class that lm-eval talks to; a function, as lm-eval is not always there."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class HarnessModel(TemplateLM):
        """A `Subject` as lm-eval sees it."""

        def __init__(
            self,
            subject: Subject,
            talking: bool,
            thinks: bool,
            max_tokens: int | None,
            seed: int,
            progress: Progress,
        ) -> None:
            super().__init__()
            self.subject, self.talking, self.thinks, self.max_tokens = subject, talking, thinks, max_tokens
            self.seed, self.progress = seed, progress
            if dist.is_available() and dist.is_initialized():
                self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
            self._device = torch.device("cpu")  # of what lm-eval gathers
            self.account, self._name = Account(), ""
            self._store: Store | _Forgetful = _Forgetful()

        @contextmanager
        def keeping(self, name: str, path: Path | None) -> Iterator[None]:
            """Keep an account of what is asked inside, and the answers in `path`."""
            self._name = name
            self.account = Account(
                {
                    "model": self.subject.digest,
                    "format": self.subject.describe(self.thinks) if self.talking else None,
                    "thinks": self.thinks,
                    "max_tokens": self.max_tokens,
                    "seed": self.seed,
                }
            )
            with Store(path) if path is not None else _Forgetful() as self._store:
                yield
            if self.world_size > 1:
                found = self.gather_object(self.account)
                self.account.join((found or [])[1:])

        # What lm-eval asks of the tokenizer.

        @property
        def eot_token_id(self) -> int:
            if not isinstance(self.subject, LocalSubject):
                raise UserError(NO_TEXTS)
            return self.subject.tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:
            return self.subject.document("")[0]

        @property
        def tokenizer_name(self) -> str:
            return self.subject.digest

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            """Ids of a text; with the token that begins a document, unless told otherwise."""
            if add_special_tokens is False:
                return self.subject.tokens(string) or []
            return self.subject.document(string)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            """The conversation as JSON, to be read again by `generate_until`: messages stay messages on the way."""
            if not add_generation_prompt and chat_history[-1]["role"] == "assistant" and not self.subject.can_continue:
                raise UserError(f"{LM}{self._name}: begins the reply itself, which a server does not let us do")
            return json.dumps(chat_history, ensure_ascii=False)

        def chat_template(self, chat_template: bool | str = False) -> str:
            return self.subject.describe(self.thinks) if self.talking else ""

        # Likelihoods.

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return found

        def _loglikelihood_tokens(
            self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            asked = []
            for (context, continuation), before, behind in requests:
                # Where both together are cut into no more tokens than the context alone, the parts are cut apart.
                ending = behind or self.subject.tokens(continuation) or []
                asked.append(((context, continuation), self._fit(before, ending)))
            return [(row["logprob"], row["greedy"]) for row in self._score("likelihood", asked)]

        def _fit(self, before: Sequence[int], ending: Sequence[int]) -> Request:
            """A request that fits the context: the beginning of `before` goes first."""
            assert self.subject.context is not None
            room = self.subject.context + 1 - len(ending)
            if room < 1 or not ending:
                raise UserError(
                    f"{LM}{self._name}: an answer of {len(ending)} tokens cannot be scored in a context of "
                    f"{self.subject.context}"
                )
            self.account.shortened += len(before) > room
            return Request(tuple(before[-room:]), tuple(ending))

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            asked, counts = [], []
            for request in requests:
                (text,) = request.args
                windows = [
                    make_disjoint_window(window)
                    for window in get_rolling_token_windows(
                        self.tok_encode(text, add_special_tokens=False),
                        prefix_token=self.prefix_token_id,
                        max_seq_len=self.subject.context,
                        context_len=1,
                    )
                ]
                asked += [((text, place), Request(tuple(a), tuple(b))) for place, (a, b) in enumerate(windows)]
                counts.append(len(windows))
            rows = iter(self._score("rolling", asked))
            return [sum(next(rows)["logprob"] for _ in range(count)) for count in counts]

        def _score(self, kind: str, asked: Sequence[tuple[Any, Request]]) -> list[dict[str, Any]]:
            if self.subject.likelihood is None:
                raise UserError(f"{LM}{self._name}: {NO_LIKELIHOODS.format('a server')}")
            keys = [self._key(kind, arguments, 0) for arguments, _ in asked]
            requests = {key: request for key, (_, request) in zip(keys, asked, strict=True)}
            missing = [key for key in requests if self._store.get(key) is None]
            clock = self._clock(len(requests), len(missing), "likelihoods")

            def keep(index: int, score: Score) -> None:
                request = requests[missing[index]]
                tokens = len(request.context) + len(request.continuation)
                row = {"logprob": score.logprob, "greedy": score.greedy, "tokens": tokens}
                self._store.add(missing[index], row | {"seconds": round(clock.tick(tokens), 4)})

            self.subject.likelihood.score([requests[key] for key in missing], keep)
            clock.finish()
            return self._rows(keys)

        # Replies.

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            seen: Counter[str] = Counter()
            keys, asked = [], {}
            for request in requests:
                context, given = request.args
                wanted = normalize_gen_kwargs(given, REPLY)
                name = digest([context, given])
                key = self._key("reply", [context, given], seen[name])
                seed = seed_of(self.seed, self._name, name, seen[name])
                seen[name] += 1  # a task that repeats a question wants another reply
                keys.append(key)
                stops = [stop for stop in wanted["until"] if stop]
                params = SamplingParams(
                    temperature=float(wanted.get("temperature", 1.0)) if wanted["do_sample"] else 0.0,
                    top_p=float(wanted.get("top_p") or 1.0),
                    top_k=max(0, int(wanted.get("top_k") or 0)),
                    seed=seed,
                    max_tokens=self.max_tokens or wanted["max_gen_toks"],
                    # What ends an answer may stand in a thought.
                    stop=() if self.thinks else tuple(stops),
                )
                asked[key] = context, params, stops
            if self.talking:
                self._refuse({key: context for key, (context, _, _) in asked.items()})
            missing = [key for key in asked if self._store.get(key) is None]
            clock = self._clock(len(asked), len(missing), "replies")

            refusals: dict[int, UserError] = {}

            def keep(index: int, reply: Reply) -> None:
                if index in refusals:
                    return
                text = cut(reply.content, asked[missing[index]][2])
                row = {"text": text, "finish_reason": reply.finish_reason, "tokens": reply.tokens}
                self._store.add(missing[index], row | {"seconds": round(clock.tick(reply.tokens), 4)})

            prompts, chosen = [asked[key][0] for key in missing], [asked[key][1] for key in missing]
            try:
                if self.talking:
                    completer = self.subject.chat(self.thinks)
                    if isinstance(completer, Endpoint):
                        completer = replace(completer, on_refusal=refusals.__setitem__)
                    completer.complete([_conversation(prompt) for prompt in prompts], chosen, keep)
                else:
                    texts = [self._fitting(prompt, each) for prompt, each in zip(prompts, chosen, strict=True)]
                    self.subject.continue_texts(texts, chosen, keep)
            except UserError as error:
                raise Unfinished(
                    f"{LM}{self._name}: {error}; {clock.done} of {clock.total} replies are kept"
                ) from error
            clock.finish()
            if refusals and len(refusals) == len(missing):
                raise UserError(f"{LM}{self._name}: every question was refused: {refusals[min(refusals)]}")
            self.account.refused += len(refusals)
            refused = {missing[index] for index in refusals}
            return ["" if key in refused else row["text"] for key, row in zip(keys, self._rows(keys), strict=True)]

        def _refuse(self, prompts: dict[Key, str]) -> None:
            """Give conversations that leave no room for a reply an empty one."""
            for key, prompt in prompts.items():
                length = self.subject.chat_tokens(_conversation(prompt), self.thinks)
                if length is not None and self.subject.context is not None and length >= self.subject.context:
                    row = {"text": "", "finish_reason": "length", "tokens": 0, "seconds": 0.0, "unasked": True}
                    self._store.add(key, row)

        def _fitting(self, prompt: str, params: SamplingParams) -> str:
            """The end of a prompt that leaves room for the reply."""
            assert self.subject.context is not None and params.max_tokens is not None
            room = self.subject.context - min(params.max_tokens, max(1, self.subject.context // 4))
            if len(self.subject.document(prompt)) <= room:
                return prompt
            self.account.shortened += 1
            low, high = 0, len(prompt)  # characters that have to go: more than low, at most high
            while high - low > 1:
                middle = (low + high) // 2
                fits = len(self.subject.document(prompt[middle:])) <= room
                low, high = (low, middle) if fits else (middle, high)
            return prompt[high:]

        # What is kept.

        def _key(self, kind: str, arguments: Any, sample: int) -> Key:
            return kind, sample, digest([self.account.settings, arguments])

        def _clock(self, total: int, missing: int, what: str) -> Clock:
            return Clock(f"{LM}{self._name}", total, total - missing, what, self.progress)

        def _rows(self, keys: Sequence[Key]) -> list[dict[str, Any]]:
            """What is kept under each key; nothing of refused questions."""
            rows = {key: self._store.rows.get(key, {}) for key in keys}
            for row in filter(None, rows.values()):
                self.account.add(row)
            return [rows[key] for key in keys]

        # Data parallelism.

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            if self.world_size == 1:
                return tensor
            found = [torch.zeros_like(tensor) for _ in range(self.world_size)]
            dist.all_gather(found, tensor)
            return torch.stack(found)

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
            if self.world_size == 1:
                return [obj]
            found = [None] * self.world_size if self.rank == dst else None
            dist.gather_object(obj, found, dst=dst)
            return found

        def barrier(self) -> None:
            if self.world_size > 1:
                dist.barrier()

    return HarnessModel


class _Forgetful:
    """A `Store` that keeps nothing on the disk."""

    def __init__(self) -> None:
        self.rows: dict[Key, dict[str, Any]] = {}
        self.get = self.rows.get

    def __enter__(self) -> "_Forgetful":
        return self

    def __exit__(self, *_: object) -> None: ...

    def add(self, key: Key, values: dict[str, Any]) -> None:
        self.rows[key] = values


def _conversation(prompt: str) -> list[dict[str, Any]]:
    """What `apply_chat_template` made a text of; a reply that lm-eval begins is left open."""
    messages: list[dict[str, Any]] = json.loads(prompt)
    if messages[-1]["role"] == "assistant":
        messages[-1] = messages[-1] | {"prefix": True}
    return messages
