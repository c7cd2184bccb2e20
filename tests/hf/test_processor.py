"""Text and videos to what the model takes: placeholders, chat templates, files, saving."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from families import HYBRID, STRIDES, VIDEO, WIDTH, close, language_model, word_tokenizer
from transformers import AutoProcessor, PreTrainedTokenizerFast

from slowfast_model import PatchTower
from slowfast_model.hf import SlowFastVLForConditionalGeneration, SlowFastVLProcessor, add_slow_fast

WORDS = ["<pad>", "<user>", "<assistant>", "what", "is", "this", "?", "a", "cat", "dog"]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(WORDS)} | {"<video>": VIDEO}
    made = word_tokenizer(vocabulary, ["<video>", "<user>", "<assistant>"], pad_token="<pad>", padding_side="left")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def model() -> SlowFastVLForConditionalGeneration:
    tower = PatchTower(WIDTH, grid=4, patch=6)
    return add_slow_fast(language_model(), WIDTH, HYBRID, vision_tower=tower, video_token_id=VIDEO, **STRIDES)


@pytest.fixture
def processor(tokenizer, model) -> SlowFastVLProcessor:
    return SlowFastVLProcessor(tokenizer, model.config, num_frames=8)


@pytest.fixture
def clip(tmp_path) -> str:
    clips = pytest.importorskip("video_clips")
    return str(clips.write_clip(tmp_path / "clip.mp4", 12, (32, 32)))


def frames(count: int = 8) -> torch.Tensor:
    return torch.randint(256, (count, 20, 30, 3), dtype=torch.uint8)


def test_a_placeholder_becomes_one_for_each_fast_token(processor, model):
    videos = [frames(8), frames(4)]
    inputs = processor(
        text=["<user> <video> what is this ?", "<user> <video> a cat"], videos=videos, return_tensors="pt"
    )
    assert inputs.keys() == {"input_ids", "attention_mask", "pixel_values_videos"}
    assert (inputs["input_ids"] == VIDEO).sum(1).tolist() == [8, 4]
    assert inputs["attention_mask"].sum(1).tolist() == [1 + 8 + 4, 1 + 4 + 2]
    assert inputs["attention_mask"][1, 0] == 0  # the tokenizer pads on the left
    assert all(torch.equal(a, b) for a, b in zip(inputs["pixel_values_videos"], videos, strict=True))
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape == (2, 13 + 2)
    assert model(**inputs).logits.shape == (2, 13, 100)


def test_text_alone(processor):
    inputs = processor(text="what is this ?")
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert list(inputs["input_ids"][0]) == [3, 4, 5, 6]


def test_files_are_read_as_load_video_reads_them(processor, clip):
    from slowfast_model import load_video

    inputs = processor(text=["<video> what"], videos=[clip], return_tensors="pt")
    assert torch.equal(inputs["pixel_values_videos"][0], load_video(clip, 8))
    assert processor(text=["<video> what"], videos=clip, num_frames=4)["pixel_values_videos"][0].shape[0] == 4


@pytest.mark.parametrize("kind", ["array", "list"])
def test_frames_of_other_kinds(processor, kind):
    video = frames(4)
    given = video.numpy() if kind == "array" else [picture.numpy() for picture in video]
    assert torch.equal(processor(text="<video>", videos=[given])["pixel_values_videos"][0], video)


def test_a_conversation(processor, clip, model):
    content = [{"type": "video", "path": clip}, {"type": "text", "text": " what is this ?"}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<user> <video> what is this ? <assistant>"
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert inputs["input_ids"].tolist() == [[1, *[VIDEO] * 8, 3, 4, 5, 6, 2]]
    assert inputs["pixel_values_videos"][0].shape == (8, 32, 32, 3)
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert isinstance(processor.batch_decode(answer)[0], str)
    ids = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    assert list(ids[0]) == inputs["input_ids"][0].tolist()


def test_several_conversations_with_several_videos(processor):
    first = [{"role": "user", "content": [{"type": "video", "video": frames(8)}, {"type": "text", "text": " what"}]}]
    first += [{"role": "assistant", "content": "a cat"}]
    first += [{"role": "user", "content": [{"type": "text", "text": "this "}, {"type": "video", "video": frames(4)}]}]
    second = [{"role": "user", "content": "a dog"}]
    inputs = processor.apply_chat_template([first, second], tokenize=True, return_dict=True, return_tensors="pt")
    assert (inputs["input_ids"] == VIDEO).sum(1).tolist() == [8 + 4, 0]
    assert [len(video) for video in inputs["pixel_values_videos"]] == [8, 4]


@pytest.mark.parametrize("auto", [False, True])
def test_what_is_saved_is_what_is_loaded(processor, auto, tmp_path):
    processor.save_pretrained(tmp_path)
    again = (AutoProcessor if auto else SlowFastVLProcessor).from_pretrained(tmp_path)
    assert type(again) is SlowFastVLProcessor
    assert (again.num_frames, again.tokens_per_frame) == (8, None)
    assert again.config.to_dict() == processor.config.to_dict()
    assert again.chat_template == TEMPLATE
    video = frames()
    for one in (processor, again):
        assert list(one(text="<video> what", videos=[video])["input_ids"][0]) == [*[VIDEO] * 8, 3]


def test_a_processor_beside_its_model(processor, model, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "slowfast_vl"
    again, read = SlowFastVLForConditionalGeneration.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    inputs = read(text="<video> what", videos=[frames()], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("what", 1, "videos: got 1, want 0"),
        ("<video> what", 0, "videos: got 0, want 1"),
        ("<video> <video>", 1, "videos: got 1, want 2"),
    ],
)
def test_another_number_of_placeholders_than_of_videos(processor, text, count, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, videos=[frames()] * count)


def test_frames_that_are_none(processor):
    with pytest.raises(TypeError, match=r"videos\[0\]: got torch.float32, want uint8"):
        processor(text="<video>", videos=[frames().float()])
    with pytest.raises(ValueError, match=r"videos\[0\]: got shape \[20, 30, 3\]"):
        processor(text="<video>", videos=[frames()[0]])
    with pytest.raises(FileNotFoundError):
        processor(text="<video>", videos=["nowhere.mp4"])


@pytest.mark.parametrize(
    ("video", "kind", "got"),
    [
        ([], ValueError, "got list.*at least one"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)], ValueError, "got list.*of one size"),
        (["a.mp4", "b.mp4"], TypeError, "got list.*name of a file"),
        (np.array([None, None]), TypeError, "got ndarray"),
        (None, TypeError, "got NoneType"),
        (5, TypeError, "got int"),
    ],
)
def test_what_is_no_video(processor, video, kind, got):
    with pytest.raises(kind, match=rf"videos\[0\]: {got}"):
        processor(text="<video>", videos=[video])


def test_a_truncation_that_cuts_a_video(processor):
    call = {"text": "<video> what is this ?", "videos": [frames()], "truncation": True}
    for tensors in (None, "pt"):
        with pytest.raises(ValueError, match=r"leaves 6 of 8 placeholders.*max_length"):
            processor(**call, max_length=6, return_tensors=tensors)
        assert len(processor(**call, max_length=10, return_tensors=tensors)["input_ids"][0]) == 10


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_padded_on_either_side_is_its_samples(processor, model, side):
    processor.tokenizer.padding_side = side
    texts, videos = ["what <video> is", "a <video> cat <video> dog", "dog"], [[frames(8)], [frames(4), frames(1)], []]
    inputs = processor(text=texts, videos=[x for own in videos for x in own], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
        for row, keep, text, own in zip(logits, inputs["attention_mask"].bool(), texts, videos, strict=True):
            close(row[keep], model(**processor(text=text, videos=own, return_tensors="pt")).logits[0])


@pytest.mark.parametrize("part", [{"type": "image", "path": "x.png"}, {"type": "text"}, {"type": "video"}, "what"])
def test_content_of_another_kind(processor, part):
    with pytest.raises(ValueError, match=f"conversation: got .*{part if isinstance(part, str) else part['type']}"):
        processor.apply_chat_template([{"role": "user", "content": [part]}])


def test_tokens_of_a_frame_must_be_known(tokenizer):
    config = add_slow_fast(language_model(), WIDTH, HYBRID, video_token_id=VIDEO).config
    with pytest.raises(ValueError, match="tokens_per_frame: got None"):
        SlowFastVLProcessor(tokenizer, config)(text="<video>", videos=[frames()])
    inputs = SlowFastVLProcessor(tokenizer, config, tokens_per_frame=16)(text="<video>", videos=[frames()])
    assert len(inputs["input_ids"][0]) == 8 * 16
    with pytest.raises(TypeError, match="config: got NoneType"):
        SlowFastVLProcessor(tokenizer)
