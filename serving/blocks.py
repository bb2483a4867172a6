"""The pages of the latent cache: who holds which, and which still hold a known beginning of a text (prefix caching).

Pure bookkeeping, without torch. A block is a page of `page_size` tokens, in all layers. A full block whose latents are
computed has a *key*: the hash of everything up to its end. A request whose text begins in the same way shares it.
Blocks that nobody holds keep their content and key until they are needed: the free list is the cache, least recently
used first. Where a text leaves a known one within a block, what they have in common is there to be copied (`begin`).
"""

import hashlib
import struct
from array import array
from collections.abc import Iterable, Sequence
from itertools import islice

LEAST_COMMON = 8  # tokens that are worth a copy, or half a block
CANDIDATES = 8  # that are looked at: many texts may begin with the same tokens


def root_key(salt: bytes) -> bytes:
    """Where the chain of a tenant begins: texts of different salts never share a block, nor does the time that a
    request takes tell what others have asked."""
    return hashlib.sha256(b"dsv3" + salt).digest()


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a block of `tokens` behind the blocks that `parent` stands for."""
    return hashlib.sha256(parent + struct.pack(f"{len(tokens)}q", *tokens)).digest()


class BlockPool:
    """`num_blocks` blocks. A block is free (nobody holds it), or held by one request or several.

    caching: False gives keys to none, so nothing is ever found again.
    """

    def __init__(self, num_blocks: int, page_size: int, caching: bool = True) -> None:
        self.num_blocks, self.page_size, self.caching = num_blocks, page_size, caching
        self._least = min(LEAST_COMMON, page_size // 2)
        self._holders = [0] * num_blocks
        self._key: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._place: list[tuple[bytes, bytes] | None] = [None] * num_blocks  # where `_behind` has it
        self._tokens: list[array[int]] = [array("q")] * num_blocks
        self._behind: dict[tuple[bytes, bytes], dict[int, None]] = {}  # blocks by the key before and their first tokens
        self._blank = list(range(num_blocks - 1, -1, -1))  # free and of no known content
        self._kept: dict[int, None] = {}  # free and known, least recently used first
        self._parts: dict[int, None] = {}  # the same of blocks that are not full: they go before those

    @property
    def available(self) -> int:
        """Blocks that can be taken now."""
        return len(self._blank) + len(self._parts) + len(self._kept)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known beginning of the chain `keys`. Nothing is held yet: see `share`."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def begin(self, parent: bytes, tokens: Sequence[int]) -> tuple[int, int]:
        """The block behind `parent` whose content has most in common with `tokens`, from the first one on, and how many
        that are: 0 where none has enough. Nothing is held."""
        wanted = array("q", tokens)
        best, most = -1, 0
        candidates = self._behind.get((parent, wanted[: self._least].tobytes()), {})
        for block in islice(reversed(candidates), CANDIDATES):
            pairs = enumerate(zip(wanted, content := self._tokens[block], strict=False))
            common = next((place for place, (x, y) in pairs if x != y), min(len(wanted), len(content)))
            if common > most:
                best, most = block, common
        return best, most

    def free_among(self, blocks: Sequence[int]) -> int:
        """How many of these nobody holds: to share them takes so many off `available`."""
        return sum(not self._holders[block] for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Hold blocks that `find` found, or that another request holds."""
        for block in blocks:
            if not self._holders[block]:
                del self._kept[block]
            self._holders[block] += 1

    def take(self, count: int) -> list[int]:
        """Hold `count` blocks of no known content. The caller has looked at `available`."""
        if count > self.available:
            raise RuntimeError(f"{count} blocks are wanted and {self.available} are free")
        blocks = []
        for _ in range(count):
            block = self._blank.pop() if self._blank else self._evict()
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def _evict(self) -> int:
        known = self._parts or self._kept
        block = next(iter(known))
        del known[block]
        self._unname(block)
        return block

    def _unname(self, block: int) -> None:
        key = self._key[block]
        if key is not None:
            del self._block_of[key]
            self._key[block] = None
        place = self._place[block]
        if place is not None:
            siblings = self._behind[place]
            del siblings[block]
            if not siblings:
                del self._behind[place]
            self._place[block] = None

    def name(self, block: int, key: bytes, parent: bytes, tokens: Sequence[int]) -> None:
        """Say that a held block is computed and full of `tokens`, behind what `parent` stands for. Where another block
        has this content, that one stays known."""
        if self.caching and self._key[block] is None and key not in self._block_of:
            self._key[block] = key
            self._block_of[key] = block
            self._file(block, parent, tokens)

    def name_part(self, block: int, parent: bytes, tokens: Sequence[int]) -> None:
        """The same of a block that is to be let go with less in it: nobody can share it, but copy from it."""
        if self.caching and self._key[block] is None and len(tokens) >= self._least:
            self._file(block, parent, tokens)

    def _file(self, block: int, parent: bytes, tokens: Sequence[int]) -> None:
        content = self._tokens[block] = array("q", tokens)
        place = self._place[block] = parent, content[: self._least].tobytes()
        self._behind.setdefault(place, {})[block] = None

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a request's blocks, in its order. Later blocks are of less use to others: they go first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                if self._key[block] is not None:
                    self._kept[block] = None
                elif self._place[block] is not None:
                    self._parts[block] = None
                else:
                    self._blank.append(block)

    def grow(self, num_blocks: int) -> None:
        """Become `num_blocks` blocks; the new ones are free."""
        more = range(self.num_blocks, num_blocks)
        self._holders += [0] * len(more)
        self._key += [None] * len(more)
        self._place += [None] * len(more)
        self._tokens += [array("q")] * len(more)
        self._blank = [*reversed(more), *self._blank]
        self.num_blocks = num_blocks

    def forget(self) -> None:
        """Drop all that is known of contents: the weights have changed."""
        self._block_of.clear()
        self._behind.clear()
        self._key = [None] * self.num_blocks
        self._place = [None] * self.num_blocks
        self._blank += [*self._parts, *self._kept]
        self._parts.clear()
        self._kept.clear()
