"""What README and docstrings say runs: every Python block, every example, and the tables that are made from lists."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from collections import Counter
from dataclasses import is_dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from docstrings import check_arguments
from model_cases import one_thread  # noqa: F401

import slowfast_kernels
import slowfast_model
from bench.__main__ import BENCHMARKS
from bench.selection import check_shapes
from slowfast_model.config import GATING_TYPES, IMPLEMENTATIONS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What ``<!-- example: ... -->`` before a block may say; tests/hf runs the last two.
NEEDS_GPU, DOWNLOADS, TRANSFORMERS, RELEASED = "needs a GPU", "downloads", "transformers", "released"


class Block(NamedTuple):
    marker: str | None
    line: int
    code: str

    def compiled(self):
        tree = ast.parse(self.code)
        ast.increment_lineno(tree, self.line - 1)  # a traceback names the line of README
        return compile(tree, str(ROOT / "README.md"), "exec")


def blocks() -> list[Block]:
    fence = re.compile(r"(?:<!-- example: ([^\n]*) -->\n)?```python\n(.*?)```", re.DOTALL)
    return [
        Block(found[1], README[: found.start(2)].count("\n") + 1, found[2])
        for found in fence.finditer(README)
    ]  # fmt: skip


def test_readmes_examples_are_counted():
    """A block that stops running must say so, and change this."""
    marked = {NEEDS_GPU: 1, DOWNLOADS: 1, TRANSFORMERS: 1, RELEASED: 1}
    assert Counter(block.marker for block in blocks()) == {None: 8, **marked}
    assert README.count("```python\n") == len(blocks())
    for block in blocks():
        block.compiled()


def tiny_language_model(name: str):
    """In place of a download: a Qwen2 of random weights, as transformers makes it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 9}
    config = transformers.Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return transformers.Qwen2ForCausalLM(config).eval()


def test_readmes_examples_run_one_after_another(tmp_path, monkeypatch, capsys):
    clips = pytest.importorskip("video_clips")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", tiny_language_model)
    clips.write_clip(tmp_path / "clip.mp4", 40)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks():
        if block.marker in (TRANSFORMERS, RELEASED) or (block.marker == NEEDS_GPU and not torch.cuda.is_available()):
            continue
        exec(block.compiled(), names)
        assert torch.is_grad_enabled(), f"README.md:{block.line} leaves gradients off for the next one"
    assert (names["frames"].shape, names["features"].shape) == ((32, 64, 64, 3), (32, 144, 64))
    assert names["loss"] > 0
    assert next(names["model"].parameters()).dtype == torch.bfloat16
    assert "tensor([[" in capsys.readouterr().out  # the generated ids


# ------------------------------------------------------------------------------------------------ docstrings


def modules(package):
    yield package
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if found.name != "slowfast_model.hf":  # imports transformers; its docstrings: tests/hf/test_docs.py
            yield importlib.import_module(found.name)


def examples():
    """Docstrings of slowfast_model with an example; they go on from the package's own."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [test for module in modules(slowfast_model) for test in finder.find(module) if test.examples]
    return [pytest.param(test, id=test.name) for test in tests if test.name != slowfast_model.__name__]


@pytest.fixture
def setting():
    """The names that the package's docstring introduces."""
    names: dict = {}
    example = doctest.DocTestParser().get_doctest(slowfast_model.__doc__, names, "slowfast_model", None, 0)
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, clear_globs=False).failed == 0
    return example.globs


@pytest.mark.parametrize("example", examples())
def test_a_docstrings_example_runs_and_says_what_it_prints(example, setting, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "".join(part.source for part in example.examples)
    for package, sign in {"transformers": "import Qwen2", "safetensors": "save_pretrained("}.items():
        if sign in source:
            pytest.importorskip(package)
    example.globs = setting
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    report: list[str] = []
    failed = doctest.DocTestRunner(optionflags=flags).run(example, out=report.append).failed
    assert not failed, "".join(report)


def test_what_a_user_does_with_a_model_has_an_example():
    shown = {param.id.removeprefix("slowfast_model.") for param in examples()}
    model = "model.SlowFastForCausalLM"
    assert shown >= {
        *(f"{model}.{name}" for name in ("forward", "gradient_checkpointing_enable", "load_qwen2_state_dict")),
        *(f"{model}.{name}" for name in ("from_pretrained", "save_pretrained")),
        "generate.GenerationMixin.generate",
        "session.DecodeSession",
        "config.SlowFastConfig",
        "vision.encode_frames",
    }


def public_callables():
    """(name, what has the docstring, the function with the signature) of the model's public names and their methods."""
    for name in slowfast_model.__all__:
        thing = getattr(slowfast_model, name)
        if not inspect.isclass(thing):
            if callable(thing):
                yield pytest.param(thing, thing, id=name)
            continue
        if "__init__" in vars(thing) and not is_dataclass(thing):
            yield pytest.param(thing, thing.__init__, id=name)
        for method in dir(thing):
            if method.startswith("_") or not callable(getattr(thing, method)):
                continue
            function = inspect.unwrap(getattr(thing, method))
            if getattr(function, "__module__", "").startswith("slowfast_model"):
                yield pytest.param(function, function, id=f"{name}.{method}")


@pytest.mark.parametrize(("documented", "called"), list(public_callables()))
def test_a_public_docstring_speaks_of_every_argument_and_of_no_other(documented, called):
    check_arguments(documented, called)


# --------------------------------------------------------------------------------------------------- tables


def section(name: str) -> list[str]:
    """The table rows between ``<!-- name: ... -->`` and ``<!-- /name -->``."""
    text = re.search(rf"<!-- {name}:.*?-->\n(.*?)<!-- /{name} -->", README, re.DOTALL)[1]
    return [line for line in text.splitlines() if re.match(r"\| `[^`]*-|\| `vanilla`", line)]


ACTIVATED = {"linear": "w · a + b", "tanh": "tanh(w · a + b)"}


def test_readmes_table_of_variants_is_that_of_the_configuration():
    expected = []
    for name, gating in GATING_TYPES.items():
        formula = ACTIVATED[gating.gate]
        if gating.has_warm_up:
            formula = f"({formula}) f(u)" if gating.gate == "linear" else f"{formula} f(u)"
        expected.append(f'| `{name}` | {formula} | `"{gating.gate}"` |')
    for name, implementation in IMPLEMENTATIONS.items():
        rows = "text"
        if implementation.every_row:
            rows = "text and visual (all-to-media)"
        elif implementation.masks_system:
            rows = "text from the sample's first visual token on"
        expected.append(f"| `{name}` | {rows} | {'u' if implementation.every_row else 'tanh(u)'} |")
    assert section("variants") == expected


def test_readmes_table_of_extras_is_that_of_the_package():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = project.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    table = README.split("| extra |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == re.findall(r"^(\w+) = \[", declared, re.MULTILINE)


def test_readme_names_the_triton_that_was_tested_with_the_torch_it_installs():
    torch_version = re.search(r"pip install torch==(\S+)", README)[1]
    triton_version = re.search(r"triton==(\S+) is what was tested beside a CPU build of torch (\S+)\n", README)
    assert triton_version[2] == torch_version
    assert re.search(rf"^\| {torch_version} \| {triton_version[1]} \|", README, re.MULTILINE)


def measured(block: str, heading: str) -> list[list[float]]:
    """Of each table between ``<!-- block -->`` and ``<!-- /block -->`` that has this column: its numbers."""
    text = re.search(rf"<!-- {block}\b.*?-->\n(.*?)<!-- /{block} -->", README, re.DOTALL)[1]
    columns = []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        names, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        if heading in names:
            place = names.index(heading)
            columns.append([float(row[place].strip("+%x")) for row in rows])
    return columns


def test_readmes_headlines_are_what_its_tables_say():
    headline = {line.split(" |")[0]: line for line in README.split("## Install")[0].splitlines() if line[:2] == "| "}

    def said(begin: str) -> str:
        return next(line for name, line in headline.items() if name.startswith(f"| {begin}"))

    attention = measured("attention", "best peer / cuda")[0]  # the second table is without rests
    assert f"the {len(attention)} shapes below" in said("attention")
    pool, mix = measured("pool-mix", "best peer / cuda")
    (backward,) = measured("backward", "best peer / ours")
    for begin, ratios in (("attention", attention), ("forward", backward), ("pooling", pool), ("pooling", mix)):
        assert f"{min(ratios):.2f}x to {max(ratios):.2f}x" in said(begin)
    frames = measured("model", "frames")[0].index(128)
    prefill, decode = (column[frames] for column in measured("model", "added"))
    assert f"prefill {prefill:.1f}% more time" in said("a 7B model")
    assert f"a decoded token {decode:.1f}%" in said("a 7B model")


COMMANDS = re.findall(rf"python -m bench ({'|'.join(BENCHMARKS)})( --backward)? --shapes (\S+)", README)


@pytest.mark.parametrize(("what", "backward", "shapes"), COMMANDS)
def test_readmes_own_shapes_are_shapes(what, backward, shapes):
    check_shapes(shapes.split(","), (what,), bool(backward))


def test_readme_shows_a_shape_of_your_own_for_every_benchmark_and_for_gradients():
    assert {what for what, backward, _ in COMMANDS if not backward} == set(BENCHMARKS)
    assert any(backward for _, backward, _ in COMMANDS)


def test_the_result_files_that_readme_prints_are_there():
    files = re.findall(r"python -m bench report (\S+\.json)", README)
    assert files
    assert all((ROOT / file).is_file() for file in files)


def test_every_link_of_readme_leads_somewhere():
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]*)?)\)", README):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        assert not path or (ROOT / path).exists(), target
        assert not anchor or anchor in headings, target


def test_the_packages_name_what_they_export():
    for package in (slowfast_kernels, slowfast_model):
        assert sorted(package.__all__) == sorted(set(package.__all__))
        assert all(hasattr(package, name) for name in package.__all__)
