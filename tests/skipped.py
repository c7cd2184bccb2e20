"""How many cases a skip hides."""

from __future__ import annotations

import ast
import math
from fractions import Fraction
from pathlib import Path


def hidden_by_backend(items) -> dict[str, int]:
    """Cases of the collected tests that are not here, because ``targets`` left their backend out."""
    hidden: dict[str, Fraction] = {}
    for item in items:
        for mark in item.iter_markers("parametrize"):
            targets = mark.args[1] if len(mark.args) > 1 else ()
            for backend, count in getattr(targets, "left_out", {}).items():  # shared out over the cases that are here
                hidden[backend] = hidden.get(backend, Fraction(0)) + Fraction(count, len(targets))
    return {backend: int(count) for backend, count in hidden.items()}


def cases_written_in(path: Path) -> int:
    """Test functions of a file, each as often as lists that it is parametrised with in place say."""
    tree, count = ast.parse(path.read_text(encoding="utf-8")), 0
    for test in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        if test.name.startswith("test_"):
            calls = (node for node in test.decorator_list if isinstance(node, ast.Call) and len(node.args) > 1)
            lists = (call.args[1] for call in calls if ast.unparse(call.func).endswith("parametrize"))
            count += math.prod(max(1, len(x.elts)) for x in lists if isinstance(x, ast.List | ast.Tuple))
    return count
