"""A model behind a server with OpenAI's API (`/v1/chat/completions`): vLLM, SGLang, llama.cpp, api.deepseek.com, ours.

Requests are made by a few threads. What passes (no connection, 408, 409, 429, 5xx, an answer that breaks off or takes
too long) is tried again after 1, 2, 4, ... seconds, or after what the server asks for in Retry-After; what does not
pass is said at once. Replies are handed out as they come, so that a server which dies for good costs the rest only.
"""

import contextlib
import email.utils
import http.client
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ..errors import UserError
from .completer import Conversation, Reply, split_reply
from .generate import SamplingParams
from .special_tokens import END_THINK, THINK

RETRIED = (408, 409, 429)  # besides 5xx: the server was busy, not the request wrong
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # seconds
LONGEST_WISH = 600.0  # seconds of Retry-After that are worth waiting for
LARGEST_ANSWER = 2**28  # bytes
SHOWN = 200  # characters of a server's own words in an error


class _Passing(Exception):
    """A failure worth another try. wait: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Stopped(Exception):
    """Another request has failed for good."""


class Refused(UserError):
    """The server refuses this very request (400, 413, 422: too long for its context, say); others may do."""


@dataclass
class Endpoint:
    """A `Completer`: asks `model` at `url` (".../v1"; "/v1" is added where the URL has no path).

    api_key_env: environment variable that holds the key, "" for none; the key goes to this server only, and into no
        message. timeout: seconds that one request may take. retries: further tries after the first. concurrency:
        requests under way at a time. extra: fields for the body of every request, over our own.
    on_refusal: hears of a conversation that the server refuses as such, whose reply is then empty and cut short;
        without it the refusal of one ends them all.

    `SamplingParams` become OpenAI's fields; top_k, min_p and ignore_eos, which only some servers know, are sent where
    they are set. stop_token_ids belong to a tokenizer of this machine and stay here. A seed of None is not sent.
    """

    url: str
    model: str
    api_key_env: str = ""
    timeout: float = 600.0
    retries: int = 6
    concurrency: int = 16
    extra: Mapping[str, Any] = field(default_factory=dict)
    on_refusal: Callable[[int, UserError], None] | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"endpoint {self.url!r} is no URL of a server: write it like http://localhost:8000/v1")
        if "@" in parts.netloc:
            raise UserError("the endpoint's URL holds a password; put the key into an environment variable instead")
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        self.base = f"{parts.scheme}://{parts.netloc}{path or '/v1'}"
        self.name = self.model
        self._key = os.environ.get(self.api_key_env, "") if self.api_key_env else ""
        if self.api_key_env and not self._key:
            raise UserError(f"the environment variable {self.api_key_env}, which should hold the key, is not set")

    def check(self) -> None:
        """One quick question without retries: UserError where nobody answers, the key is refused, or the model is not
        among those that the server names."""
        try:
            names = self._models()
        except _Passing as failure:
            raise UserError(f"{self.base} does not answer ({failure}); is the server running there?") from None
        if names and self.model not in names:
            raise UserError(f"{self.base} has no model {self.model!r}; it has {_list(names)}")

    def complete(
        self,
        conversations: Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams],
        on_reply: Callable[[int, Reply], None] | None = None,
    ) -> list[Reply]:
        """See `Completer`; `on_reply` is called on this thread. Where a request fails for good, those under way may
        still end and are handed out before the UserError is raised."""
        chosen = [params] * len(conversations) if isinstance(params, SamplingParams) else list(params)
        replies: dict[int, Reply] = {}
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        finished: queue.SimpleQueue[tuple[int, Reply | BaseException]] = queue.SimpleQueue()
        stop = threading.Event()
        for index in range(len(conversations)):
            waiting.put(index)

        def work() -> None:
            while not stop.is_set():
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                answer: Reply | BaseException
                try:
                    answer = self.ask(conversations[index], chosen[index], stop)
                except BaseException as error:
                    if not isinstance(error, Refused) or self.on_refusal is None:
                        stop.set()
                    answer = error
                finished.put((index, answer))

        # Daemons, as Ctrl-C must not wait for a server that thinks for minutes.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.concurrency, len(conversations)))]
        for thread in threads:
            thread.start()
        failure: BaseException | None = None
        try:
            # Threads first: one may leave its last word between the two questions.
            while any(thread.is_alive() for thread in threads) or not finished.empty():
                try:
                    index, answer = finished.get(timeout=0.1)
                except queue.Empty:
                    continue
                if isinstance(answer, Refused) and self.on_refusal is not None:
                    self.on_refusal(index, answer)
                    replies[index] = Reply("", "", "", "length", 0)
                elif isinstance(answer, BaseException):
                    failure = answer if failure is None or isinstance(failure, _Stopped) else failure
                else:
                    replies[index] = answer
                    if on_reply is not None:
                        on_reply(index, answer)
        finally:
            stop.set()
        if failure is not None:
            raise failure
        return [replies[index] for index in range(len(conversations))]

    def ask(self, conversation: Conversation, params: SamplingParams, stop: threading.Event | None = None) -> Reply:
        """One conversation. stop: ends the waiting between tries."""
        return parse_answer(self.request(self.body(conversation, params), stop))

    def body(self, conversation: Conversation, params: SamplingParams) -> dict[str, Any]:
        """What is sent."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in conversation],
            "temperature": params.temperature,
            "top_p": params.top_p,
        }
        optional = {
            "max_tokens": params.max_tokens,
            "seed": params.seed,
            "stop": list(params.stop) or None,
            "top_k": params.top_k or None,
            "min_p": params.min_p or None,
            "ignore_eos": params.ignore_eos or None,
        }
        return body | {key: value for key, value in optional.items() if value is not None} | dict(self.extra)

    def request(self, body: Mapping[str, Any], stop: threading.Event | None = None) -> dict[str, Any]:
        """The server's answer to a body, after as many tries as it takes. UserError in one line after the last."""
        stop = stop or threading.Event()
        for attempt in range(self.retries + 1):
            try:
                return self._post("/chat/completions", body)
            except _Passing as failure:
                if attempt == self.retries:
                    tries = f"{attempt + 1} tries" if attempt else "1 try"
                    raise UserError(f"{self.base}: no answer after {tries} ({failure}); is the server well?") from None
                delay = min(FIRST_DELAY * 2**attempt, LONGEST_DELAY)
                if failure.wait is not None:
                    if failure.wait > LONGEST_WISH:
                        raise UserError(
                            f"{self.base} asks to come back in {failure.wait:.0f} seconds ({failure}); run again then"
                        ) from None
                    delay = failure.wait
                if stop.wait(delay):
                    raise _Stopped from None
        raise AssertionError("unreachable")

    # HTTP.

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"})
        try:
            return self._open(request)
        except urllib.error.HTTPError as error:
            raise self._meaning(error) from None

    def _open(self, request: urllib.request.Request) -> dict[str, Any]:
        """The JSON object that answers a request. Passes HTTPError on; all that may pass is `_Passing`."""
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        deadline = time.monotonic() + self.timeout
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = json.loads(_read(response, deadline))
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError as error:
            raise _Passing(_reason(error.reason)) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(_reason(error)) from None
        except ValueError:
            raise _Passing("the answer is not JSON") from None
        if not isinstance(answer, dict):
            raise _Passing("the answer is not a JSON object")
        return answer

    def _meaning(self, error: urllib.error.HTTPError) -> Exception:
        """What a status says to the user."""
        said = self._words(error)
        if error.code in RETRIED or error.code >= 500:
            return _Passing(f"{error.code} {said}", _retry_after(error.headers.get("Retry-After")))
        if error.code in (401, 403):
            hint = (
                f"is the key in {self.api_key_env} the right one?"
                if self.api_key_env
                else "name the environment variable that holds its key (api_key_env)"
            )
            return UserError(f"{self.base} refuses us ({error.code} {said}); {hint}")
        if error.code == 404:
            names: list[str] = []
            with contextlib.suppress(UserError, _Passing):
                names = self._models()
            if names and self.model not in names:
                return UserError(f"{self.base} has no model {self.model!r}; it has {_list(names)}")
            return UserError(
                f"{self.base}/chat/completions is not there ({error.code} {said}); does the URL end as the server's "
                "manual says (most end in /v1), and is the model's name right?"
            )
        return Refused(f"{self.base} refuses the request ({error.code} {said})")

    def _models(self) -> list[str]:
        """Names that the server lists; none where it has no such list."""
        try:
            answer = self._open(urllib.request.Request(self.base + "/models"))
        except urllib.error.HTTPError as error:
            if error.code in (404, 405, 501):
                return []
            raise self._meaning(error) from None
        listed = answer.get("data")
        return (
            [str(row["id"]) for row in listed if isinstance(row, dict) and "id" in row]
            if isinstance(listed, list)
            else []
        )

    def _words(self, error: urllib.error.HTTPError) -> str:
        """The server's own words, in one short line, without the key."""
        try:
            text = error.read(65536).decode("utf-8", errors="replace")
        except (OSError, http.client.HTTPException):
            text = ""
        with contextlib.suppress(ValueError):
            found = json.loads(text)
            for key in ("error", "message", "detail"):
                found = found.get(key, found) if isinstance(found, dict) else found
            text = found if isinstance(found, str) else json.dumps(found)
        line = " ".join(text.split()) or str(error.reason)
        if self._key:
            line = line.replace(self._key, "***")
        return line if len(line) <= SHOWN else line[:SHOWN] + "..."


def parse_answer(answer: Mapping[str, Any]) -> Reply:
    """The reply in a chat completion, wherever the server puts the thought: `reasoning_content`, `reasoning`, or inline
    between tags, of which the template may have written the first.

    A natural end is "stop"; whatever else ended the reply (length, a filter) is "length". tokens: 0 where the server
    does not count them.
    """
    try:
        choice = answer["choices"][0]
        message = choice["message"]
    except (KeyError, IndexError, TypeError):
        raise UserError("the server's answer holds no choices[0].message: is it a chat completion?") from None
    content = _text(message.get("content"))
    thought = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
    natural = choice.get("finish_reason") in ("stop", "tool_calls", "function_call", "eos")
    if thought:
        opened = f"{THINK}\n{thought.strip(chr(10))}"
        text = opened if not content and not natural else f"{opened}\n{END_THINK}\n\n{content}"
    elif END_THINK in content and THINK not in content.partition(END_THINK)[0]:
        text = f"{THINK}\n{content.lstrip(chr(10))}"
    else:
        text = content.lstrip() if content.lstrip().startswith(THINK) else content
    reasoning, rest = split_reply(text)
    usage = answer.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
    return Reply(text, reasoning, rest, "stop" if natural else "length", tokens if isinstance(tokens, int) else 0)


def _text(content: Any) -> str:
    """Content is a string, null, or a list of parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole body, by the deadline: the socket's own limit starts anew with every byte that drips in."""
    announced = response.headers.get("Content-Length", "")
    expected = int(announced) if announced.isdigit() else None
    parts, size = list[bytes](), 0
    while (expected is None or size < expected) and (part := response.read1(65536)):
        parts.append(part)
        size += len(part)
        if size > LARGEST_ANSWER:
            raise _Passing(f"the answer is larger than {LARGEST_ANSWER} bytes")
        if time.monotonic() > deadline:
            raise _Passing("it took too long")
    if expected is not None and size < expected:
        raise _Passing("the answer breaks off")
    return b"".join(parts)


def _retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header: a number, or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _reason(error: object) -> str:
    if isinstance(error, TimeoutError):
        return "it took too long"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, http.client.IncompleteRead):
        return "the answer breaks off"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
