"""``python -m slowfast_model ask``: what it prints where, what it refuses and how, and its exit codes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from families import HYBRID, STRIDES, VIDEO, WIDTH, language_model, open_gates
from test_chat import TEMPLATE, tokenizer
from test_processor import clip  # noqa: F401
from transformers.utils import logging

from slowfast_model import PatchTower
from slowfast_model.__main__ import main
from slowfast_model.ask import _interrupt_ends_answer, _sampling, timings_table
from slowfast_model.hf import SlowFastVLProcessor, VideoChat, add_slow_fast

GREEDY = ["--temperature", "0", "--max-new-tokens", "5"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny model with its processor."""
    path = tmp_path_factory.mktemp("model")
    tower = PatchTower(WIDTH, grid=4, patch=6)
    keys = STRIDES | {"vision_tower": tower, "video_token_id": VIDEO, "causal_slow_tokens": True}
    model = open_gates(add_slow_fast(language_model(), WIDTH, HYBRID, **keys))
    model.save_pretrained(path)
    SlowFastVLProcessor(tokenizer(), model.config, num_frames=8, chat_template=TEMPLATE).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _logging_as_before():
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def run(directory, capsys, monkeypatch):
    """(exit code, stdout, stderr) of arguments, with lines on stdin."""

    def run(*arguments, lines=(), model=directory):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        code = main(["ask", "--model", str(model), "--device", "cpu", *GREEDY, *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def chat(directory) -> VideoChat:
    return VideoChat.from_pretrained(directory, do_sample=False, max_new_tokens=5)


def test_a_question_about_a_video(run, chat, clip):  # noqa: F811
    answer = chat.ask("what is this", [clip])
    assert run("--video", clip, "what is this") == (0, answer.text + "\n", "")


def test_several_videos_and_fewer_frames(run, chat, clip):  # noqa: F811
    chat.num_frames = 4
    answer = chat.ask("what is this", [clip, clip])
    assert run("--video", clip, "--video", clip, "--frames", 4, "what is this") == (0, answer.text + "\n", "")


def test_a_question_without_a_video(run, chat):
    assert run("what is this") == (0, chat.ask("what is this").text + "\n", "")


def test_json_is_one_object(run, chat, clip):  # noqa: F811
    want = chat.ask("what is this", [clip])
    code, out, err = run("--json", "--video", clip, "--dtype", "float32", "what is this")
    got = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert (got["answer"], got["counts"]) == (want.text, want.counts)
    assert got["timings"].keys() == want.timings.keys()


def test_timings_on_stderr(run, chat, clip):  # noqa: F811
    code, out, err = run("--timings", "--video", clip, "what is this")
    assert (code, out) == (0, chat.ask("what is this", [clip]).text + "\n")
    stages = [line.split("  ")[0] for line in err.splitlines()]
    assert stages == ["decode video", "preprocess", "tower", "pool", "K/V", "prefill", "each token"]
    assert "32 slow and 8 fast tokens" in err
    assert "tokens/s" in err.splitlines()[-1]


def test_the_table_of_a_gpu_has_its_memory():
    timings = dict.fromkeys(("decode_video", "preprocess", "tower", "pool", "kv", "prefill"), 0.25)
    timings |= {"token": None, "tokens_per_second": None, "peak_memory_bytes": 2_340_000_000}
    names = ("videos", "frames", "fast_tokens", "slow_tokens", "cached_tokens", "prompt_tokens", "new_tokens")
    *_, token, memory = timings_table(timings, dict.fromkeys(names, 1)).splitlines()
    assert token.split() == ["each", "token", "-", "1", "tokens"]
    assert memory.split() == ["peak", "memory", "2.34", "GB"]


def test_a_conversation_on_stdin(run, chat, clip):  # noqa: F811
    turns = [("what is this", [clip]), ("a cat", []), ("is this", [clip, clip])]
    want = "".join(chat.ask(*turn).text + "\n" for turn in turns)
    lines = ["what is this", "", "a cat", f"/video {clip}", f"/video {clip}", " is this "]
    assert run("--video", clip, lines=lines) == (0, want, "")


def test_a_conversation_as_json(run, chat, clip):  # noqa: F811
    want = [chat.ask("what is this", [clip]).text, chat.ask("a cat").text]
    code, out, _ = run("--json", "--video", clip, lines=["what is this", "a cat"])
    assert code == 0
    assert [json.loads(line)["answer"] for line in out.splitlines()] == want


def test_a_turn_that_fails_leaves_the_conversation(run, chat, tmp_path):
    (tmp_path / "notes.mp4").write_text("no video")
    want = "".join(chat.ask(question).text + "\n" for question in ("what is this", "a cat"))
    lines = ["what is this", "/video nowhere.mp4", f"/video {tmp_path / 'notes.mp4'}", "what", "/speak", "a cat"]
    code, out, err = run(lines=lines)
    assert (code, out) == (1, want)
    missing, no_video, command = err.splitlines()
    assert "no such video file: nowhere.mp4" in missing
    assert "notes.mp4" in no_video
    assert "got /speak, want a question or /video PATH" in command


def test_progress_on_a_terminal(run, chat, clip, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", sys.stderr)  # one screen
    code, _, screen = run("--video", clip, "what is this")
    *shown, last = screen.split("\r\x1b[K")
    shown = [text for text in shown if text.endswith("%")]
    assert code == 0
    assert [text for text in shown if text.startswith("decode")][::11] == ["decode video: 8%", "decode video: 100%"]
    assert shown[-1] == "tower: 100%"
    assert last == chat.ask("what is this", [clip]).text + "\n"


def test_sampling():
    given = {"temperature": None, "top_p": None}
    assert _sampling(Namespace(**given)) == {}
    assert _sampling(Namespace(**given | {"temperature": 0.0})) == {"do_sample": False}
    assert _sampling(Namespace(**given | {"temperature": 0.5})) == {"do_sample": True, "temperature": 0.5}
    assert _sampling(Namespace(**given | {"top_p": 0.9})) == {"do_sample": True, "top_p": 0.9}


def test_a_compiled_step_has_a_static_cache(run, chat, monkeypatch):
    want = chat.ask("what is this").text
    monkeypatch.setattr("slowfast_model.ask._device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(VideoChat, "from_pretrained", lambda *_, device, dtype, **given: _with(chat, device, given))
    assert run("--compile", 16, "what is this") == (0, want + "\n", "")
    assert "static_rows: got 10, want at least 11" in one_line(*run("--compile", 10, "what is this"))


def _with(chat, device, given):
    assert device.type == "cuda"
    return VideoChat(chat.model, chat.processor, **given)


def test_a_seed_fixes_what_is_sampled(run):
    sampled = [run("--temperature", 9, "--max-new-tokens", 12, "--seed", seed, "what")[1] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


# ----------------------------------------------------------------------------------------------------- errors


def without_config(directory, tmp_path):
    return tmp_path, "no config.json in it"


def absent(directory, tmp_path):
    return tmp_path / "nothing", "no such directory"


def language_model_alone(directory, tmp_path):
    language_model().save_pretrained(tmp_path)
    return tmp_path, "model_type: got 'qwen2'"


def without_weights(directory, tmp_path):
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    return tmp_path, "which cannot be read"


def cut_weights(directory, tmp_path):
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes()[:5000])
    return tmp_path, "which cannot be read"


def no_json(directory, tmp_path):
    (tmp_path / "config.json").write_text("model")
    return tmp_path, "which cannot be read"


def without_processor(directory, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    return tmp_path, "want a processor beside the model"


def one_line(code, out, err) -> str:
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("python -m slowfast_model ask: error: ")
    return err


@pytest.mark.parametrize(
    "kind",
    [absent, without_config, language_model_alone, without_weights, cut_weights, no_json, without_processor],
    ids=lambda kind: kind.__name__,
)
def test_a_directory_that_holds_no_model(run, directory, tmp_path, kind):
    path, message = kind(directory, tmp_path)
    error = one_line(*run("what", model=path))
    assert f"--model: got {path}" in error
    assert message in error


def test_a_video_that_is_not_there_is_told_before_the_model_is_read(run, tmp_path):
    assert "no such video file: nowhere.mp4" in one_line(*run("--video", "nowhere.mp4", "what", model=tmp_path))


def test_a_video_that_cannot_be_read(run, tmp_path):
    (tmp_path / "notes.mp4").write_text("no video")
    assert "notes.mp4" in one_line(*run("--video", tmp_path / "notes.mp4", "what"))


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there(run, device):
    assert f"--device: got {device}" in one_line(*run("--device", device, "what"))


def test_nothing_is_compiled_on_a_cpu(run):
    assert "--compile: got it for a CPU" in one_line(*run("--compile", 64, "what"))


def test_out_of_memory_names_the_ways_out(run, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(VideoChat, "ask", full)
    assert "out of memory" in one_line(*run("what"))
    monkeypatch.setattr(VideoChat, "from_pretrained", full)
    assert "want fewer --frames" in one_line(*run("what"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--frames", "0"),
        ("--max-new-tokens", "1.5"),
        ("--temperature", "-1"),
        ("--top-p", "0"),
        ("--fps", "inf"),
        ("--dtype", "int8"),
        ("--compile", "what"),
        ("a", "b"),
    ],
)
def test_wrong_arguments(run, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m slowfast_model")
    assert ": error: " in error
    assert error.count("\n") == 1


def test_without_the_extra_it_says_what_is_missing(directory):
    code = "import sys; sys.modules['transformers'] = None; from slowfast_model.__main__ import main; sys.exit(main())"
    arguments = ["ask", "--model", str(directory), "what"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert "pip install 'slowfast-kernels[hf]'" in one_line(done.returncode, done.stdout, done.stderr)


# -------------------------------------------------------------------------------------------------- interrupts


@pytest.fixture
def interruptible():
    """As a program in a terminal: one in the background of a shell may be born deaf to SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_the_answer_and_a_second_one_the_program(interruptible):
    stopped = []
    before = signal.getsignal(signal.SIGINT)
    with _interrupt_ends_answer(SimpleNamespace(stop=lambda: stopped.append(True))):
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped == [True]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with _interrupt_ends_answer(SimpleNamespace(stop=None)):
        pass
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupted_program_says_so_by_its_exit_code(run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoChat, "ask", interrupted)
    assert run("what") == (130, "", "")
