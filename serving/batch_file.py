"""Files in OpenAI's batch format: lines of requests to read, lines of results to write.

Results are written as they come, to `OUT.part`, which takes the name OUT when all are there. A run that was interrupted
goes on from that file: what is answered in it is not asked again.
"""

import fcntl
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct

from ..errors import UserError

URLS = ("/v1/chat/completions", "/v1/completions")


class _Given(Struct):
    custom_id: Annotated[str, Meta(min_length=1)]
    method: str
    url: str
    body: Raw


class _Response(Struct):
    status_code: int
    request_id: str
    body: Raw


class _Result(Struct):
    """error: of what never got a response; here everything gets one."""

    id: str
    custom_id: str
    response: _Response
    error: None = None


@dataclass(frozen=True)
class Line:
    """A request. body: JSON of an object, as it stands in the file. model: that it names."""

    number: int
    custom_id: str
    url: str
    body: bytes
    model: str | None


def read_lines(path: Path) -> list[Line]:
    """All requests of a file; blank lines are passed over. Raises UserError, naming the line, for what is not in the
    format."""
    try:
        texts = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    lines: dict[str, Line] = {}
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = _line(number, text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        if line.custom_id in lines:
            earlier = lines[line.custom_id].number
            raise UserError(f"{path}, line {number}: the custom_id {line.custom_id!r} is that of line {earlier}, too")
        lines[line.custom_id] = line
    if not lines:
        raise UserError(f"{path}: holds no requests")
    return list(lines.values())


def _line(number: int, text: bytes) -> Line:
    """Raises ValueError, of which msgspec's errors are, or RecursionError."""
    given = msgspec.json.decode(text, type=_Given)
    if given.method != "POST":
        raise ValueError("method must be POST")
    if given.url not in URLS:
        raise ValueError(f"url must be {' or '.join(URLS)}")
    try:
        fields = msgspec.json.decode(given.body, type=dict[str, Raw])
    except msgspec.ValidationError:
        raise ValueError("body must be an object") from None
    if bytes(fields.get("stream", Raw(b"false"))) not in (b"false", b"null"):
        raise ValueError("a file cannot take a stream; leave `stream` out")
    try:
        model = msgspec.json.decode(fields.get("model", Raw(b"null")), type=str | None)
    except msgspec.ValidationError:
        model = None  # the server will say what is wrong with it
    return Line(number, given.custom_id, given.url, bytes(given.body), model)


class Results:
    """The file of results to some requests, while its block lasts; a file that is there already is an error.

    made_of: what the answers depend on besides the requests. Part of the results' ids, by which a later run knows
    whether an answer is one to what it would ask.
    answered: custom_ids with a result. statuses: how many results have each status.
    """

    def __init__(self, out: Path, lines: Sequence[Line], made_of: str) -> None:
        self.out, self.part = out, out.with_name(out.name + ".part")
        self._ids = {line.custom_id: _id(line, made_of) for line in lines}
        self.answered: set[str] = set()
        self.statuses: Counter[int] = Counter()

    def __enter__(self) -> "Results":
        """Raises UserError for files that cannot be written, and for a part that is not of these requests."""
        if self.out.exists():
            raise UserError(f"{self.out}: is there already; remove it, or give another --out")
        try:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.part.open("a+b")
        except OSError as error:
            raise UserError(f"{self.part}: cannot be written ({error.strerror}); give another --out") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._take_up()
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{self.part}: another run writes there; give another --out") from None
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A part without any result is not left behind."""
        if error is not None and not self.answered:
            self.part.unlink(missing_ok=True)
        self._file.close()

    def _take_up(self) -> None:
        """What an earlier run has left, without a last line that it did not write to its end."""
        self._file.seek(0)
        whole = 0
        for number, text in enumerate(self._file, 1):
            if not text.endswith(b"\n"):
                break
            try:
                result = msgspec.json.decode(text, type=_Result)
            except msgspec.MsgspecError as error:
                raise UserError(f"{self.part}, line {number}: is damaged ({error}); remove the file") from None
            if self._ids.get(result.custom_id) != result.id:
                why = "is the answer to another request, or of another model"
                raise UserError(f"{self.part}, line {number}: {why}; remove the file, or give another --out")
            self._count(result.custom_id, result.response.status_code)
            whole += len(text)
        self._file.truncate(whole)

    def _count(self, custom_id: str, status: int) -> None:
        self.answered.add(custom_id)
        self.statuses[status] += 1

    def add(self, line: Line, status: int, request_id: str, body: bytes) -> None:
        """Raises UserError for a full disk."""
        response = _Response(status, request_id, Raw(body))
        result = _Result(self._ids[line.custom_id], line.custom_id, response)
        try:
            self._file.write(msgspec.json.encode(result) + b"\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.part}: cannot be written ({error.strerror}); the same command goes on") from None
        self._count(line.custom_id, status)

    def finish(self) -> None:
        """All results are there: the file gets its name."""
        os.fsync(self._file)
        os.replace(self.part, self.out)


def _id(line: Line, made_of: str) -> str:
    digest = hashlib.sha256(b"\0".join((made_of.encode(), line.url.encode(), line.body))).hexdigest()
    return f"batch_req_{digest[:32]}"
