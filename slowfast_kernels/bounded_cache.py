"""What was worked out for one call and may serve the next, kept within so many bytes instead of so many entries.

An entry grows with the batch that it describes: a number of entries bounds nothing for whoever trains on ragged
batches, each of which is new.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Generic, TypeVar

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """Values by key, of ``max_bytes`` together; the ones unused for longest go first. The newest always stays."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._entries: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Value | None:
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                return None
            self._entries.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, value: Value, num_bytes: int) -> Value:
        """Keeps ``value`` and returns it, or the one that another thread has put there in the meantime."""
        with self._lock:
            if key in self._entries:
                return self._entries[key][0]
            self._entries[key] = (value, num_bytes)
            self.num_bytes += num_bytes
            while self.num_bytes > self.max_bytes and len(self._entries) > 1:
                _, (_, dropped) = self._entries.popitem(last=False)
                self.num_bytes -= dropped
        return value
