"""How the packages hang together: what a reader may rely on when following an import."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def imported_modules(file: Path, modules: set[str]) -> set[str]:
    """Names of ``modules`` that a file of a package imports from it anywhere: in functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            if node.module is None:
                found |= {alias.name for alias in node.names}
            else:
                found.add(node.module.partition(".")[0])
    return found & modules


@pytest.mark.parametrize("package", ["slowfast_model", "slowfast_kernels/ops"])
def test_modules_of_a_package_import_one_another_without_a_circle(package):
    files = {file.stem: file for file in (ROOT / package).glob("*.py") if file.stem != "__init__"}
    graph = {name: imported_modules(file, set(files)) for name, file in files.items()}
    assert any(graph.values())
    assert len(list(TopologicalSorter(graph).static_order())) == len(files)


@pytest.mark.parametrize("package", ["slowfast_model"])
def test_no_conditional_expression_is_a_statement_or_holds_another(package):
    """An ``if`` says it better."""
    for file in (ROOT / package).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            where = f"{file.name}:{getattr(node, 'lineno', 0)}"
            assert not (isinstance(node, ast.Expr) and isinstance(node.value, ast.IfExp | ast.BoolOp)), where
            if isinstance(node, ast.IfExp):
                assert sum(isinstance(part, ast.IfExp) for part in ast.walk(node)) == 1, where
