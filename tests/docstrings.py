"""What a public docstring has to say of a function's arguments."""

from __future__ import annotations

import inspect
import re


def check_arguments(documented, called) -> None:
    """The docstring of ``documented`` speaks of every argument of ``called`` and, under Args, of no other."""
    doc = inspect.getdoc(documented)
    assert doc, "no docstring"
    arguments = [name for name in inspect.signature(called).parameters if name not in ("self", "cls")]
    missing = [name for name in arguments if not re.search(rf"\b{name}\b", doc)]
    assert not missing, f"no word of {missing}"
    if "Args:\n" in doc:
        section = doc.split("Args:\n")[1].split("\n\n")[0]
        entries = re.findall(r"^    (\w+(?:, \w+)*):", section, re.MULTILINE)
        assert sorted(name for entry in entries for name in entry.split(", ")) == sorted(arguments)
