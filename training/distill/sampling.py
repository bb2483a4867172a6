"""Replies of the teacher, drawn one by one and kept one by one.

samples.jsonl has one line per reply: {"prompt": id, "seed", "text", "finish_reason", "tokens"}. Prompt and seed are its
key. Seeds follow from the settings, so a run that was interrupted knows what is missing and draws just that.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...core.completer import Completer, Reply
from ...core.files import atomic_write
from ...errors import UserError
from ..progress import Progress
from .config import SamplingSection
from .prompts import Prompt, seeds
from .worklog import WorkLog

SAMPLES, SETTINGS = "samples", "sampling.json"
KEYS = ("prompt", "seed")
AT_ONCE = 16  # batches that a local teacher gets at a time: it sorts them by length
REFUSALS = 3  # refused requests before the first reply that mean that something is wrong with all of them

Item = tuple[Prompt, int]


def check_settings(run_dir: Path, section: SamplingSection, seed: int, teacher: Mapping[str, Any]) -> None:
    """Samples of one folder come from one teacher and one way to sample; more of them may be wanted later.

    Notes both in sampling.json, or raises UserError where it notes another.
    """
    plain = section.to_dict()
    plain.pop("samples")
    wanted = json.loads(json.dumps({"teacher": dict(teacher), "sampling": plain, "seed": seed}))
    path = run_dir / SETTINGS
    if not path.exists():
        with atomic_write(path, "w") as file:
            json.dump(wanted, file, indent=1, ensure_ascii=False)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    for group in wanted:
        old, new = found.get(group), wanted[group]
        if old != new:
            changed = next(
                (f"{group}.{key}" for key in new if not isinstance(old, dict) or old.get(key) != new[key]), group
            ) if isinstance(new, dict) else group  # fmt: skip
            raise UserError(
                f"{run_dir} holds samples that were drawn otherwise ({changed} has changed): put it back, or use "
                "another run_dir"
            )


def missing(prompts: Sequence[Prompt], section: SamplingSection, seed: int, log: WorkLog) -> list[Item]:
    """(prompt, seed) of the samples that are not there yet: the first of every prompt, then the second, ..."""
    done = log.places()
    chosen = [seeds(prompt.id, seed, section.samples) for prompt in prompts]
    items = [(p, own[j]) for j in range(section.samples) for p, own in zip(prompts, chosen, strict=True)]
    return [(p, s) for p, s in items if (p.id, s) not in done]


class Sampler:
    """Asks a teacher for what is missing. stop_token_ids: that end a reply, for a model of this process.

    done: samples kept so far, tokens: of them; refused: those that a server would not answer.
    """

    def __init__(
        self,
        section: SamplingSection,
        log: WorkLog,
        progress: Progress,
        stop_token_ids: tuple[int, ...] = (),
    ) -> None:
        self.section, self.log, self.progress, self.stop_token_ids = section, log, progress, stop_token_ids
        self.done = self.tokens = self.refused = 0
        self._items: Sequence[Item] = []
        self._refusals: list[Item] = []

    def sample(self, teacher: Completer, items: Sequence[Item], batch: int = 0) -> None:
        """Draw a sample for each item. batch: conversations of a local teacher; 0 hands all to it at once."""
        began, total = time.monotonic(), len(items)

        def hear(index: int, reply: Reply) -> None:
            prompt, seed = self._items[index]
            self._keep(prompt, seed, reply.text, reply.finish_reason, reply.tokens)
            self._keep_refusals()
            seconds = time.monotonic() - began
            left = int(seconds / self.done * (total - self.done))
            self.progress.show(
                f"sampling: {self.done:,} of {total:,} replies ({self.done / total:.0%}) | "
                f"{self.tokens / self.done:,.0f} tokens each | {self.tokens / seconds:,.0f} tok/s | "
                f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left",
                final=self.done == total,
            )

        size = batch * AT_ONCE or max(1, total)
        for start in range(0, total, size):
            self._items = items[start : start + size]
            conversations = [conversation(prompt, self.section.system) for prompt, _ in self._items]
            params = [replace(self.section.params(s), stop_token_ids=self.stop_token_ids) for _, s in self._items]
            teacher.complete(conversations, params, hear)
        if self._refusals:
            raise UserError(f"the teacher refuses all of {len(self._refusals)} prompts: see the notes above")

    def on_refusal(self, index: int, error: UserError) -> None:
        """A server refuses one conversation: kept as a sample without text, so that it is not asked again; but only
        once the server has answered another one, for else something is wrong with all of them."""
        self.refused += 1
        self._refusals.append(self._items[index])
        if self.done:
            self._keep_refusals()
        elif self.refused >= REFUSALS:
            raise error
        if self.refused <= REFUSALS:
            self.progress.say(f"note: {error}")

    def _keep_refusals(self) -> None:
        for prompt, seed in self._refusals:
            self._keep(prompt, seed, "", "refused", 0)
        self._refusals.clear()

    def _keep(self, prompt: Prompt, seed: int, text: str, finish_reason: str, tokens: int) -> None:
        self.log.append(
            {"prompt": prompt.id, "seed": seed, "text": text, "finish_reason": finish_reason, "tokens": tokens}
        )
        self.done, self.tokens = self.done + 1, self.tokens + tokens


def conversation(prompt: Prompt, system: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": system}, *prompt.messages] if system else list(prompt.messages)
