"""Who may ask, and whose prefix cache a request shares."""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers

from .errors import Unauthorized


@dataclass(frozen=True)
class Tenant:
    """Whoever holds one key. salt: requests share cached prefixes within it, never across."""

    number: int
    salt: bytes


class Keys:
    """API keys, kept as digests. With none, everybody is one tenant.

    The salt is made here, not taken from the client: whoever could choose it could look into another's cache.
    """

    def __init__(self, keys: Sequence[str], secret: bytes) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        salts = [hmac.digest(secret, key.encode(), "sha256") for key in keys or ("",)]
        self.tenants = [Tenant(number, salt) for number, salt in enumerate(salts)]

    def tenant(self, headers: Headers) -> Tenant:
        """Of a request; raises Unauthorized. Every key is compared, so that time tells nothing."""
        if not self._digests:
            return self.tenants[0]
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("an API key is needed: send it as `Authorization: Bearer KEY`")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        equal = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(equal):
            raise Unauthorized("this API key is not known here")
        return self.tenants[equal.index(True)]
