"""The model that is evaluated, as far as this process can reach it: weights in memory, or a server."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from ..core.completer import Completer, Conversation, LocalCompleter, Reply
from ..core.encoding import detect_format, encode_chat
from ..core.generate import Rollout, SamplingParams
from ..core.special_tokens import THINK
from ..core.tokenizer import Tokenizer
from ..errors import UserError
from .likelihood import Likelihood

BATCH = 64
TOKENS = 2**18  # of the prompts of a batch
NO_TEXTS = (
    "a server that chats can neither go on with a text nor say how likely one is, as base models are asked; give "
    "--protocol r1, v3 or greedy"
)


class Progress(Protocol):
    """Where a person sees how far a run is: a line that changes, and lines that stay."""

    def show(self, line: str, final: bool = False) -> None: ...
    def say(self, text: str) -> None: ...


class Subject(Protocol):
    """What the tasks ask of a model.

    digest: changes when the model does. context: tokens of prompt and reply together, None where it is not known.
    devices: how many compute, for device hours. likelihood: None where neither likelihoods nor plain texts can be had.
    can_continue: whether a conversation may end with an open message of the assistant.
    """

    name: str
    digest: str
    context: int | None
    devices: int
    likelihood: Likelihood | None
    can_continue: bool

    def chat(self, thinks: bool) -> Completer:
        """Answers conversations; `thinks`: the reply is made to begin with a thought where the format lets us.

        Raises UserError for a model without chat tokens.
        """

    def describe(self, thinks: bool) -> str:
        """The chat format that `chat` uses: part of the settings of a result."""

    def forces_thought(self) -> bool:
        """Whether `chat(True)` opens the thought itself."""

    def continue_texts(
        self, texts: Sequence[str], params: Sequence[SamplingParams], on_reply: Callable[[int, Reply], None]
    ) -> None:
        """How the model goes on with texts that begin a document; stop strings are cut off."""

    def tokens(self, text: str) -> list[int] | None:
        """Ids of a text in the middle of another; None where the tokenizer is not here."""

    def document(self, text: str) -> list[int]:
        """Ids of a text that begins a document, with the token that says so. For subjects with likelihoods."""

    def chat_tokens(self, conversation: Conversation, thinks: bool) -> int | None:
        """Length of the prompt that `chat` makes of a conversation."""


class LocalSubject:
    """A model in the memory of this process. batch: replies that are generated together."""

    can_continue = True

    def __init__(self, rollout: Rollout, tokenizer: Tokenizer, name: str, digest: str, batch: int = BATCH):
        self.rollout, self.tokenizer, self.name, self.digest, self.batch = rollout, tokenizer, name, digest, batch
        self.likelihood: Likelihood | None = Likelihood(rollout.model)
        self.context: int | None = rollout.model.config.max_position_embeddings
        self.devices = 1

    def _format(self, thinks: bool) -> tuple[str, bool]:
        """(chat format, its thinking switch)."""
        try:
            chosen = detect_format(self.tokenizer)
            encode_chat([{"role": "user", "content": ""}], chosen)
        except UserError as error:
            raise UserError(f"{error}; base models are evaluated with --protocol base") from None
        if chosen == "moonlight" and self.rollout.model.config.model_type == "kimi_k2":
            chosen = "kimi-k2"
        if thinks and chosen == "v3" and THINK in self.tokenizer.specials:
            chosen = "r1"  # the template of R1's first release does not open the thought either
        return chosen, thinks and chosen == "v3.1"

    def chat(self, thinks: bool) -> Completer:
        format, thinking = self._format(thinks)
        completer = LocalCompleter(self.rollout, self.tokenizer, format, thinking, self.name, self.batch)
        return _Ending(completer, lambda conversation: self.chat_tokens(conversation, thinks) or 0)

    def describe(self, thinks: bool) -> str:
        format, thinking = self._format(thinks)
        return f"{format}, thinking" if thinking else format

    def forces_thought(self) -> bool:
        format, thinking = self._format(True)
        return thinking or format == "r1"

    def continue_texts(
        self, texts: Sequence[str], params: Sequence[SamplingParams], on_reply: Callable[[int, Reply], None]
    ) -> None:
        prompts = [self.document(text) for text in texts]
        for rows in batches([len(prompt) for prompt in prompts], self.batch):
            chosen = [replace(params[i], stop_token_ids=(self.tokenizer.eos_id,)) for i in rows]
            for i, done in zip(rows, self.rollout.generate([prompts[i] for i in rows], chosen), strict=True):
                ids = done.token_ids[:-1] if done.token_ids[-1] == self.tokenizer.eos_id else done.token_ids
                text = cut(self.tokenizer.decode(ids, skip_special=True), params[i].stop)
                on_reply(i, Reply(text, "", text, done.finish_reason or "length", len(done.token_ids)))

    def tokens(self, text: str) -> list[int] | None:
        return self.tokenizer.encode(text)

    def document(self, text: str) -> list[int]:
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    def chat_tokens(self, conversation: Conversation, thinks: bool) -> int | None:
        format, thinking = self._format(thinks)
        return len(self.tokenizer.encode_segments(encode_chat(conversation, format, thinking=thinking)))


class _Ending:
    """A local completer that knows the end of its format's turn, whatever the model's configuration says, and takes
    fewer conversations at a time where they are long. length: tokens of a conversation."""

    def __init__(self, completer: LocalCompleter, length: Callable[[Conversation], int]) -> None:
        self.completer, self.name, self.length = completer, completer.name, length
        self.ends = tuple({completer.end, completer.tokenizer.eos_id})

    def complete(
        self,
        conversations: Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams],
        on_reply: Callable[[int, Reply], None] | None = None,
    ) -> list[Reply]:
        given = [params] * len(conversations) if isinstance(params, SamplingParams) else params
        chosen = [replace(each, stop_token_ids=self.ends) for each in given]
        replies: dict[int, Reply] = {}
        for rows in batches([self.length(conversation) for conversation in conversations], self.completer.batch):
            found = self.completer.complete([conversations[i] for i in rows], [chosen[i] for i in rows])
            for i, reply in zip(rows, found, strict=True):
                replies[i] = reply
                if on_reply is not None:
                    on_reply(i, reply)
        return [replies[i] for i in range(len(conversations))]


def batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of prompts to take together: neighbours in length, at most so many, and no more tokens than TOKENS unless
    a single one has them."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    while order:
        tokens, count = 0, 0
        for i in order[:most]:
            tokens += lengths[i]
            if count and tokens > TOKENS:
                break
            count += 1
        yield order[:count]
        order = order[count:]


class ChatSubject:
    """A model that answers conversations and nothing else: a server.

    context: of the model behind it, where it is known. Whether a reply begins with a thought is the server's affair.
    """

    can_continue = False

    def __init__(self, completer: Completer, digest: str, context: int | None = None, devices: int = 1):
        self.completer, self.name, self.digest = completer, completer.name, digest
        self.context, self.devices = context, devices
        self.likelihood: Likelihood | None = None

    def chat(self, thinks: bool) -> Completer:
        return self.completer

    def describe(self, thinks: bool) -> str:
        return "the server's"

    def forces_thought(self) -> bool:
        return False

    def continue_texts(
        self, texts: Sequence[str], params: Sequence[SamplingParams], on_reply: Callable[[int, Reply], None]
    ) -> None:
        raise UserError(NO_TEXTS)

    def tokens(self, text: str) -> list[int] | None:
        return None

    def document(self, text: str) -> list[int]:
        raise UserError(NO_TEXTS)

    def chat_tokens(self, conversation: Conversation, thinks: bool) -> int | None:
        return None


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of the stop strings."""
    places = [place for place in map(text.find, stops) if place >= 0]
    return text[: min(places)] if places else text
