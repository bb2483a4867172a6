"""Messages between two processes over a socket: four bytes of length, then msgpack."""

import socket
import struct
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")

LENGTH = struct.Struct("<I")
LARGEST = 1 << 28  # bytes: a prompt of a million tokens is a few MB


class Wire(Generic[T]):
    """One end: reads messages of type `T`, writes any."""

    def __init__(self, link: socket.socket, kind: type[T]) -> None:
        self.link = link
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray()

    def read(self) -> list[T]:
        """What has come in whole, after waiting for some bytes. Raises EOFError when the other side is gone."""
        fresh = self.link.recv(1 << 18)
        if not fresh:
            raise EOFError
        return self.feed(fresh)

    def feed(self, fresh: bytes) -> list[T]:
        """The messages that these bytes complete."""
        self._buffer += fresh
        messages, place = [], 0
        while len(self._buffer) - place >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._buffer, place)
            if size > LARGEST:
                raise EOFError  # not what we wrote: there is nothing to go on with
            if len(self._buffer) - place - LENGTH.size < size:
                break
            place += LENGTH.size
            messages.append(self._decoder.decode(memoryview(self._buffer)[place : place + size].tobytes()))
            place += size
        del self._buffer[:place]
        return messages

    def packed(self, message: object) -> bytes:
        body = self._encoder.encode(message)
        return LENGTH.pack(len(body)) + body

    def send(self, message: object) -> None:
        """Waits until it is written."""
        self.link.sendall(self.packed(message))
