"""What took long to make, by a name for all that it was made of: another process that is given it need not make it anew."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

MOST = 64 * 2**20  # bytes that are kept for others


class Shelf:
    """What this process has made, for others, and what others have made, for this one."""

    def __init__(self) -> None:
        self._made: dict[str, bytes] = {}
        self._loaded: dict[str, bytes] = {}

    def get(self, name: str) -> bytes | None:
        """What another process has made."""
        return self._loaded.get(name)

    def put(self, name: str, content: bytes) -> None:
        """Keeps something for other processes; where there is too much, the oldest goes."""
        self._made.pop(name, None)
        self._made[name] = content
        while sum(map(len, self._made.values())) > MOST:
            del self._made[next(iter(self._made))]

    def load(self, made: Mapping[str, bytes]) -> None:
        """Takes what another process has made."""
        self._loaded.update(made)

    def all(self) -> dict[str, bytes]:
        """Everything, by its names."""
        return {**self._loaded, **self._made}


shelf = Shelf()


def name_of(*words: str) -> str:
    """A name for what is made of these."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:32]
