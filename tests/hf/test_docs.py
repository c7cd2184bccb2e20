"""README's block for transformers runs, and the public docstrings speak of every argument."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from docstrings import check_arguments
from families import VOCABULARY, language_model, word_tokenizer

import slowfast_model.hf
from slowfast_model.hf import SlowFastVLForConditionalGeneration, SlowFastVLProcessor, VideoChat

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
WORDS = ["<pad>", "user", "assistant", "What", "happens?", "A", "ball", "rolls.", "<|video_pad|>"]
WORDS += [f"w{i}" for i in range(len(WORDS), VOCABULARY)]


def tiny_tokenizer(name):
    """In place of a download: words, and the token that Qwen2.5's tokenizer has for videos."""
    made = word_tokenizer({word: i for i, word in enumerate(WORDS)}, ["<|video_pad|>"])
    made.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    return made


def test_readmes_example_adds_trains_and_answers(tmp_path, monkeypatch, capsys):
    clips = pytest.importorskip("video_clips")
    monkeypatch.chdir(tmp_path)
    clips.write_clip(tmp_path / "clip.mp4", 40, (32, 32))
    sizes = {"num_hidden_layers": 17, "max_position_embeddings": 1024}
    tiny = lambda name: language_model("qwen2.5", **sizes)  # noqa: E731
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", tiny)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tiny_tokenizer)
    (code,) = re.findall(r"<!-- example: transformers -->\n```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    model, sample = names["model"], names["sample"]
    assert isinstance(model, SlowFastVLForConditionalGeneration)
    assert (sample["input_ids"] == model.config.video_token_id).sum() == 32 // 8 * 144
    assert any(gate.any() for gate in (a.cross_attn_warm_up_gate for a in model.hybrid_attentions()))
    assert torch.is_grad_enabled()
    printed = capsys.readouterr().out.splitlines()[-1].split()
    assert 1 <= len(printed) <= 32
    assert set(printed) <= set(WORDS)
    assert len([line for line in code.splitlines() if line and " import " not in line]) == 10


def documented():
    """(docstring, the function with the signature) of the public names."""
    for name in ("add_slow_fast", "accelerate_cross_attention"):
        yield pytest.param(*[getattr(slowfast_model.hf, name)] * 2, id=name)
    for kind in (
        slowfast_model.hf.SlowFastVLConfig,
        SlowFastVLForConditionalGeneration,
        SlowFastVLProcessor,
        VideoChat,
    ):
        yield pytest.param(kind, kind.__init__, id=kind.__name__)
    methods = [
        slowfast_model.hf.SlowFastVLConfig.num_fast_tokens,
        SlowFastVLForConditionalGeneration.forward,
        SlowFastVLForConditionalGeneration.from_pretrained,
        SlowFastVLForConditionalGeneration.generate,
        SlowFastVLForConditionalGeneration.encode_videos,
        SlowFastVLProcessor.__call__,
        SlowFastVLProcessor.from_pretrained,
        SlowFastVLProcessor.apply_chat_template,
        VideoChat.from_pretrained,
        VideoChat.ask,
    ]
    for method in methods:
        yield pytest.param(method, method, id=method.__qualname__)


@pytest.mark.parametrize(("documented", "called"), list(documented()))
def test_a_public_docstring_speaks_of_every_argument_and_of_no_other(documented, called):
    check_arguments(documented, called)


def test_without_transformers_the_import_says_what_is_missing():
    code = "import sys; sys.modules['transformers'] = None; import slowfast_model; import slowfast_model.hf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: slowfast_model.hf needs transformers 4.57 or newer" in done.stderr


def test_the_package_names_what_it_exports():
    assert all(hasattr(slowfast_model.hf, name) for name in slowfast_model.hf.__all__)
