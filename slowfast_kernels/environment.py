"""Environment variables that are read at every call."""

from __future__ import annotations

import os


class Variable:
    """``os.environ.get(name)``, in a fifth of its time where there is none: that raises and catches an exception."""

    def __init__(self, name: str):
        self.name, self._key = name, os.environ.encodekey(name)

    def get(self) -> str | None:
        try:
            if self._key not in os.environ._data:
                return None
        except AttributeError:  # a mapping that stands in for os.environ
            pass
        return os.environ.get(self.name)


BACKEND, DEBUG = Variable("SLOWFAST_BACKEND"), Variable("SLOWFAST_DEBUG")
