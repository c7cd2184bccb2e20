"""``ask`` on a released checkpoint's directory: its prompt, its frames and its sampling, by preset."""

from __future__ import annotations

import pytest
import torch
from released_cases import convnext, stored_convnext, write
from test_ask import _logging_as_before  # noqa: F401
from test_processor import clip  # noqa: F401

from slowfast_model.__main__ import PRESETS as NAMES
from slowfast_model.__main__ import main
from slowfast_model.hf import PRESETS, SlowFastVLForConditionalGeneration, SlowFastVLProcessor, VideoChat


@pytest.fixture
def directory(tmp_path):
    return write(tmp_path / "released", stored_convnext(convnext()))


def by_hand(directory, video, preset):
    model = SlowFastVLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    processor = SlowFastVLProcessor.from_pretrained(directory)
    content = [{"type": "video", "path": video}, {"type": "text", "text": "What happens?"}]
    made = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], **made, **preset.frames)
    torch.manual_seed(5)
    ids = model.generate(**prompt, **preset.generate | {"max_new_tokens": 9})[0, prompt["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_the_released_prompt_frames_and_sampling(directory, clip, capsys, name):  # noqa: F811
    want = by_hand(directory, clip, PRESETS[name])
    arguments = ["--video", clip, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "9", "--seed", "5"]
    capsys.readouterr()
    assert main(["ask", "--model", str(directory), *arguments, "--preset", name, "What happens?"]) == 0
    assert capsys.readouterr().out == want + "\n"


def test_the_command_line_knows_every_preset():
    assert tuple(PRESETS) == NAMES


def test_where_no_type_is_named_it_is_float16(directory):
    assert VideoChat.from_pretrained(directory).model.dtype == torch.float16
