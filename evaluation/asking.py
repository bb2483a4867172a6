"""Asking a model for replies: conversations, or texts to go on with; only for those that are not kept already."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.completer import Reply
from ..core.endpoint import Endpoint
from ..core.generate import SamplingParams
from ..errors import UserError
from .clock import Clock
from .items import Item, Task, plural
from .prompting import fit
from .protocols import Protocol, Samples
from .store import Key, Store, digest, seed_of
from .subject import Progress, Subject


class Unfinished(UserError):
    """The model failed for good in the middle of a task; what it said before is kept."""


@dataclass(frozen=True)
class Ask:
    """One reply that is wanted. prompt: a conversation or a text. fits: whether there is room for a reply at all."""

    item: Item
    sample: int
    prompt: Any
    params: SamplingParams
    key: Key
    fits: bool = True
    shots: int = 0


def asks(
    subject: Subject,
    task: Task,
    items: Sequence[Item],
    shots: Callable[[Item], Sequence[Item]],
    protocol: Protocol,
    samples: Samples,
    settings: dict[str, Any],
) -> list[Ask]:
    """Every reply that a task wants: `samples.count` to each item, each with a seed of its own."""
    found = []
    context = subject.context
    for item in items:
        prompt: Any
        if protocol.chat:
            prompt = [{"role": "user", "content": task.chat(item)}]
            length = None if context is None else subject.chat_tokens(prompt, protocol.thinks)
            fits, shown = context is None or length is None or length < context, 0
        else:
            assert context is not None
            reserve = min(settings["max_tokens"], max(1, context // 4))
            fitted = fit(task, item, shots(item), subject.document, context - reserve)
            prompt, fits, shown = fitted.text, fitted.shots is not None, fitted.shots or 0
        name = digest([settings, prompt])
        for sample in range(samples.count):
            params = SamplingParams(
                temperature=samples.temperatures[sample % len(samples.temperatures)],
                top_p=protocol.top_p,
                seed=seed_of(settings["seed"], task.name, item.id, sample),
                max_tokens=settings["max_tokens"],
                stop=() if protocol.chat else task.stop,
            )
            found.append(Ask(item, sample, prompt, params, (item.id, sample, name), fits, shown))
    return found


def ask(
    subject: Subject, name: str, wanted: Sequence[Ask], protocol: Protocol, store: Store, progress: Progress
) -> str:
    """Get the replies that the store does not have, and keep each as it comes.

    Returns what is to be said about questions that a server refused one by one (too long for its context, say), which
    have no reply; empty where there are none. Raises Unfinished where the model fails for good, with the number of
    replies that are kept, and UserError where a server refuses every single one.
    """
    fitting = [each for each in wanted if each.fits]
    missing = [each for each in fitting if store.get(each.key) is None]
    if not missing:
        return ""
    clock = Clock(name, len(fitting), len(fitting) - len(missing), "replies", progress)
    refusals: dict[int, UserError] = {}

    def keep(index: int, reply: Reply) -> None:
        if index in refusals:
            return
        store.add(
            missing[index].key,
            {
                "text": reply.text,
                "finish_reason": reply.finish_reason,
                "tokens": reply.tokens,
                "seed": missing[index].params.seed,
                "seconds": round(clock.tick(reply.tokens), 4),
            },
        )

    prompts, params = [each.prompt for each in missing], [each.params for each in missing]
    try:
        if protocol.chat:
            completer = subject.chat(protocol.thinks)
            if isinstance(completer, Endpoint):
                completer = replace(completer, on_refusal=refusals.__setitem__)
            completer.complete(prompts, params, keep)
        else:
            subject.continue_texts(prompts, params, keep)
    except UserError as error:
        raise Unfinished(f"{name}: {error}; {_kept(clock, store)}") from error
    except KeyboardInterrupt:
        progress.say(f"{name}: {_kept(clock, store)}")
        raise
    clock.finish()
    if not refusals:
        return ""
    first = refusals[min(refusals)]
    if len(refusals) == len(missing):
        raise UserError(f"{name}: every question was refused: {first}; --max-tokens may be more than the server allows")
    return f"refused, and so wrong: {plural(len(refusals), 'question')} ({first})"


def _kept(clock: Clock, store: Store) -> str:
    return f"{clock.done} of {clock.total} replies are kept in {store.path}"
