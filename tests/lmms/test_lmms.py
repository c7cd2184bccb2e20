"""slow_fast under lmms-eval: found by its name, samples as the released evaluation, answers as generate does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from slowfast_model import PatchTower, load_video
from slowfast_model.hf import SlowFastVLForConditionalGeneration, SlowFastVLProcessor, add_slow_fast

TASKS = Path(__file__).resolve().parent / "task"
WORDS = ["<pad>", "<end>", "user", "assistant", "system", "what", "is", "this", "?", "a", "cat", "dog", "red", "blue"]
VIDEO, WIDTH, FRAMES = len(WORDS), 12, 6
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
QUESTIONS = ["what is this ?", "is this a cat ?", "a dog ?"]


@pytest.fixture(scope="session")
def directory(tmp_path_factory) -> Path:
    """A tiny model with a tower, whose gates are open, and its processor, as a user saves them."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "<video>"])}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("<video>", "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    tokenizer.chat_template = TEMPLATE
    sizes = {"vocab_size": VIDEO + 1, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=1, pad_token_id=0)
    model = add_slow_fast(
        Qwen2ForCausalLM(config),
        WIDTH,
        hybrid_layers=(0, 1),
        vision_tower=PatchTower(WIDTH, grid=4, patch=6),
        video_token_id=VIDEO,
        mm_video_pooling_stride=2,
        warm_up_init=1.0,
        gate_bias_init=1.0,
    )
    with torch.no_grad():  # so that what is seen decides what is said
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed_tokens" not in name:
                parameter.normal_(std=3 * parameter[0].numel() ** -0.5)
    model.save_pretrained(directory)
    SlowFastVLProcessor(tokenizer, model.config, num_frames=FRAMES).save_pretrained(directory)
    return directory


@pytest.fixture
def clips(tmp_path, monkeypatch) -> list[dict]:
    """Documents of three clips of 10 frames a second: shorter and longer than what 6 frames at 2 a second cover."""
    documents = []
    for i, (question, length) in enumerate(zip(QUESTIONS, (8, 24, 50), strict=True)):
        name = str(tmp_path / f"{i}.mp4")
        with av.open(name, "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for frame in range(length):
                picture = np.random.default_rng(100 * i + frame).integers(0, 255, (32, 32, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        documents.append({"clip": name, "question": question, "answer": "nothing"})
    monkeypatch.chdir(tmp_path)
    return documents


def write(documents: list[dict]) -> None:
    Path("clips.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))


def alone(directory: Path, document: dict, question: str | None = None, new_tokens: int = 6) -> str:
    """The answer to one document by model and processor themselves."""
    model = SlowFastVLForConditionalGeneration.from_pretrained(directory).eval()
    processor = SlowFastVLProcessor.from_pretrained(directory)
    frames = load_video(document["clip"], FRAMES, fps=2)
    content = [{"type": "video", "video": frames}, {"type": "text", "text": question or document["question"]}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    ids = model.generate(**prompt, max_new_tokens=new_tokens, do_sample=False)
    return processor.batch_decode(ids[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def test_the_command_answers_a_task_in_batches_as_generate_does_one_by_one(directory, clips, tmp_path):
    want = [alone(directory, document) for document in clips]
    assert len(set(want)) > 1  # clips and questions matter
    clips[1]["answer"] = want[1]
    write(clips)
    command = [sys.executable, "-m", "lmms_eval", "--model", "slow_fast", "--model_args", f"pretrained={directory}"]
    command += ["--tasks", "slow_fast_clips", "--include_path", str(TASKS), "--device", "cpu"]
    command += ["--batch_size", "2", "--log_samples", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = (tmp_path / "out").rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["slow_fast_clips"]["right,none"] == pytest.approx(1 / 3)
    (samples,) = (tmp_path / "out").rglob("*samples*.jsonl")
    found = {sample["doc_id"]: sample for sample in map(json.loads, samples.read_text().splitlines())}
    assert [found[i]["filtered_resps"].strip() for i in range(3)] == want


def test_rounds_go_on_until_the_task_ends_them(directory, clips):
    write(clips[:1])
    results = simple_evaluate(
        model="slow_fast",
        model_args=f"pretrained={directory}",
        tasks=["slow_fast_rounds"],
        task_manager=TaskManager(include_path=str(TASKS), model_name="slow_fast"),
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
    )
    (sample,) = results["samples"]["slow_fast_rounds"]
    first = alone(directory, clips[0], new_tokens=4)
    second = alone(directory, clips[0], f"{first} what ?", new_tokens=4)
    assert [answer.strip() for answer in sample["resps"][0][0]] == [first, second]


# ------------------------------------------------------------------------------------------ the model itself


@pytest.fixture
def make(directory):
    """The model as lmms-eval makes it of ``--model_args``."""
    return lambda text="", **more: get_model("slow_fast").create_from_arg_string(f"pretrained={directory},{text}", more)


def shown(model, monkeypatch, *content: dict) -> list[torch.Tensor]:
    """The frames that the model is given for a message."""
    given = []
    monkeypatch.setattr(model.model, "generate", lambda **inputs: given.append(inputs) or inputs["input_ids"])
    model._answer([[{"role": "user", "content": list(content)}]], {})
    return [torch.as_tensor(frames) for frames in given[0]["pixel_values_videos"]]


@pytest.mark.parametrize(
    ("arguments", "sampling"),
    [
        ("", {"num_frames": FRAMES, "fps": 2}),
        ("num_frames=20", {"num_frames": 20, "fps": 2}),
        ("fps=5,num_frames=4", {"num_frames": 4, "fps": 5}),
        ("fps=0", {"num_frames": FRAMES}),
    ],
)
def test_videos_are_sampled_as_the_released_evaluation_or_as_asked(make, clips, monkeypatch, arguments, sampling):
    model = make(arguments.strip(","), device="cpu")
    clip = clips[2]["clip"]
    (frames,) = shown(model, monkeypatch, {"type": "video", "url": clip}, {"type": "text", "text": "what"})
    assert torch.equal(frames, load_video(clip, **sampling))


def test_pictures_are_videos_of_one_frame(make, clips, monkeypatch, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    model = make(device="cpu")
    parts = [
        {"type": "image", "url": which} for which in (picture, str(tmp_path / "picture.png"), picture.convert("L"))
    ]
    frames = shown(model, monkeypatch, *parts)
    assert [tuple(x.shape) for x in frames] == [(1, 20, 30, 3)] * 3
    assert torch.equal(frames[0], torch.from_numpy(np.asarray(picture).copy())[None])
    assert torch.equal(frames[1], frames[0])
    assert not torch.equal(frames[2], frames[0])


@pytest.mark.parametrize(
    "content",
    [
        {"type": "audio", "url": "sound.wav"},
        {"type": "video", "url": "clip.mp4", "start_time": 1.0},
        {"type": "video", "url": "clip.mp4", "end_time": 2.0},
        {"type": "video", "url": {"video_path": "clip.mp4", "video_start": 1.0}},
    ],
)
def test_what_it_cannot_show_is_refused(make, content):
    with pytest.raises(ValueError, match=r"messages: got .*, want"):
        make(device="cpu")._messages([{"role": "user", "content": [content]}])


GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, GREEDY | {"max_new_tokens": 256}),
        ({"until": ["\n\n"], "temperature": 0.0, "top_p": None, "max_new_tokens": 16}, GREEDY | {"max_new_tokens": 16}),
        ({"temperature": 0.5, "top_p": 0.9}, GREEDY | {"do_sample": True, "temperature": 0.5, "top_p": 0.9}),
        ({"temperature": 0.5, "do_sample": False, "num_beams": 3}, GREEDY | {"num_beams": 3}),
    ],
)
def test_a_task_s_settings_win_over_greedy_and_256_tokens(make, settings, want):
    assert make(device="cpu")._generation(settings) == {"max_new_tokens": 256} | want


def test_numbers_of_model_args_are_numbers_or_refused(make):
    assert make("max_new_tokens=9", device="cpu", batch_size="3").batch_size == 3
    with pytest.raises(TypeError, match="batch_size: got str 'auto'"):
        make(device="cpu", batch_size="auto")
    with pytest.raises(ValueError, match="num_frames: got 0"):
        make("num_frames=0", device="cpu")


def test_a_system_prompt_goes_before_the_question(make, monkeypatch):
    model = make("system_prompt=a cat", device="cpu")
    given = []
    monkeypatch.setattr(model.model, "generate", lambda **inputs: given.append(inputs) or inputs["input_ids"])
    model._answer([[{"role": "user", "content": [{"type": "text", "text": "a dog ?"}]}]], {})
    assert model.processor.decode(given[0]["input_ids"][0]) == "system a cat user a dog ? assistant"


def test_answers_are_made_without_cudnns_attention(make, clips):
    model, seen = make(device="cpu"), []
    for module in (model.model.vision_tower, model.model.language_model):
        module.register_forward_pre_hook(lambda *given: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    content = [{"type": "video", "url": clips[0]["clip"]}, {"type": "text", "text": "what"}]
    model._answer([[{"role": "user", "content": content}]], {"max_new_tokens": 2})
    assert len(seen) > 1
    assert not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_weights_are_of_the_type_that_is_asked_for(make):
    assert make("dtype=bfloat16", device="cpu").model.dtype == torch.bfloat16


def test_loglikelihood_says_what_a_chat_model_is_given(make):
    request = Instance("loglikelihood", ("a", "b"), 0, {"task": "t", "doc_id": 0, "repeats": 1})
    with pytest.raises(NotImplementedError, match="output_type generate_until"):
        make(device="cpu").loglikelihood([request])
