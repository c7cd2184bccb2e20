"""The processor of a released checkpoint: the ChatML prompt, ids around a video, frames, the presets; answers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from released_cases import CONFIG, DIMS, VOCABULARY, convnext, stored_convnext, write

from slowfast_model.hf import PRESETS, SlowFastVLForConditionalGeneration, SlowFastVLProcessor

SETTINGS = {"size": 64, "depths": (1, 1, 1, 1), "dims": DIMS}
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write(tmp_path_factory.mktemp("released"), {})


@pytest.fixture
def processor(directory) -> SlowFastVLProcessor:
    return SlowFastVLProcessor.from_pretrained(directory)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """12 frames at 4 a second, each brighter than the one before."""
    clips = pytest.importorskip("video_clips")
    folder = tmp_path_factory.mktemp("clips")
    return str(clips.write_clip(folder / "clip.mp4", 12, (48, 32), rate=4))


def asked(question, video):
    return [{"role": "user", "content": [{"type": "video", "path": video}, {"type": "text", "text": question}]}]


def brightness(frames):
    """Which frames of the clip these are."""
    return pytest.importorskip("video_clips").brightness(frames)


# ------------------------------------------------------------------------------------------------------- the prompt


def test_the_prompt_is_qwen_1_5_with_a_line_break_behind_the_video(processor):
    want = SYSTEM + "<|im_start|>user\n<image>\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.apply_chat_template(asked("Why?", "a.mp4"), add_generation_prompt=True) == want
    broken = asked("\nWhy?", "a.mp4")
    assert processor.apply_chat_template(broken, add_generation_prompt=True) == want
    assert processor.apply_chat_template([{"role": "user", "content": "Hi"}]) == (
        SYSTEM + "<|im_start|>user\nHi<|im_end|>\n"
    )


def test_a_system_message_replaces_the_default_and_turns_follow(processor):
    talk = [{"role": "system", "content": "Be brief."}, *asked("Why?", "a.mp4")]
    talk += [{"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
    assert processor.apply_chat_template(talk) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nSo.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
    )


def test_the_pieces_around_a_video_are_tokenised_apart_without_a_bos(processor):
    frames = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    ids = processor.apply_chat_template(asked(" What  is\nthis? ", frames), tokenize=True, add_generation_prompt=True)
    prompt = processor.apply_chat_template(asked(" What  is\nthis? ", frames), add_generation_prompt=True)
    before, after = (
        processor.tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in prompt.split("<image>")
    )
    assert ids[0] == [*before, *[VOCABULARY] * 2, *after]
    assert before[0] == VOCABULARY - 2  # <|im_start|>
    assert processor.tokenizer.padding_side == "left"


# ---------------------------------------------------------------------------------------------- frames and presets


def test_frames_are_as_many_as_the_model_was_trained_on(directory, tmp_path, clip):
    processor = SlowFastVLProcessor.from_pretrained(directory)
    assert processor.num_frames == 4  # temporal stride 2, at least 2 fast frames
    (frames,) = processor(text="<image>", videos=[clip])["pixel_values_videos"]
    assert brightness(frames) == [0, 3, 7, 11]
    assert SlowFastVLProcessor.from_pretrained(directory, num_frames=6).num_frames == 6
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"fast_token_temporal_sampling_stride": 3}))
    for file in directory.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert SlowFastVLProcessor.from_pretrained(tmp_path).num_frames == 12


def test_presets_sample_as_the_demonstration_and_the_evaluation(processor, clip):
    def taken(preset, **options):
        made = processor(text="<image>", videos=[clip], **PRESETS[preset].frames, **options)
        return brightness(made["pixel_values_videos"][0])

    assert taken("demo", num_frames=5) == [0, 2, 5, 8, 11]
    assert taken("evaluation", num_frames=8) == [0, 2, 4, 6, 8, 10]  # 2 a second of 4
    assert taken("evaluation") == [0, 4, 8, 10]  # past num_frames, so many of them: round((i + 1) * 6 / 4 - 1)
    talk = asked("Why?", clip)
    made = processor.apply_chat_template(talk, tokenize=True, return_dict=True, **PRESETS["evaluation"].frames)
    assert brightness(made["pixel_values_videos"][0]) == [0, 4, 8, 10]


def test_presets_generate_as_the_demonstration_and_the_evaluation():
    demo = {"do_sample": True, "temperature": 0.2, "top_p": 1.0, "repetition_penalty": 1.2, "max_new_tokens": 1024}
    assert dict(PRESETS["demo"].generate) == demo
    assert dict(PRESETS["evaluation"].generate) == {"do_sample": False, "num_beams": 1, "max_new_tokens": 256}


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.fixture(scope="module")
def model(directory) -> SlowFastVLForConditionalGeneration:
    """Whose tower is a stand-in with random weights."""
    from slowfast_model.hf.towers import build_tower

    pytest.importorskip("timm")
    model = SlowFastVLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32, vision_tower=False)
    torch.manual_seed(1)
    model.vision_tower = build_tower({"name": "convnext", **SETTINGS}).eval()
    return model


def test_readmes_example_answers(tmp_path, monkeypatch, clip, capsys):
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- example: released -->\n```python\n(.*?)```", text, re.DOTALL)
    (name,) = re.findall(r'^directory = "(.*?)"', code, re.MULTILINE)
    write(tmp_path / name, stored_convnext(convnext()))
    shutil.copy(clip, tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    generate = SlowFastVLForConditionalGeneration.generate

    def briefly(model, *args, **options):
        return generate(model, *args, **options | {"max_new_tokens": 2})

    monkeypatch.setattr(SlowFastVLForConditionalGeneration, "generate", briefly)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["model"].dtype == torch.float16
    assert names["ids"].shape[1] <= names["prompt"]["input_ids"].shape[1] + 2
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize("preset", PRESETS)
def test_it_answers_a_question_on_a_clip(preset, processor, model, clip):
    chosen = PRESETS[preset]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(asked("Why?", clip), **options, **chosen.frames)
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, **chosen.generate | {"max_new_tokens": 5})
    assert 1 <= ids.shape[1] - length <= 5
    assert (ids[:, length:] < VOCABULARY).all()
    assert isinstance(processor.decode(ids[0, length:], skip_special_tokens=True), str)


def test_a_batch_answers_as_one_by_one(processor, model, clip):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    talks = [asked("Why is it so?", clip), asked("Why?", clip)]
    generate = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 256}
    both = processor.apply_chat_template(talks, **options)
    got = model.generate(**both, **generate)[:, both["input_ids"].shape[1] :]
    for talk, ids in zip(talks, got, strict=True):
        alone = processor.apply_chat_template(talk, **options)
        assert torch.equal(model.generate(**alone, **generate)[0, alone["input_ids"].shape[1] :], ids)
