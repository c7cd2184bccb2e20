"""What ``python -m slowfast_model ask`` does: loads a model, answers, and says on stderr what it is at.

stdout gets answers alone. An error that the user can mend is one line; others keep their traceback.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ._container import file_name

COMMANDS = "/video PATH (the next question's video)"
MENDABLE = (OSError, ValueError, ImportError, torch.OutOfMemoryError)
_LINES = (
    ("decode_video", "decode video", "{frames} frames"),
    ("preprocess", "preprocess", ""),
    ("tower", "tower", ""),
    ("pool", "pool", "{slow_tokens} slow and {fast_tokens} fast tokens"),
    ("kv", "K/V", ""),
    ("prefill", "prefill", "{prompt_tokens} tokens behind {cached_tokens} cached ones"),
    ("token", "each token", "{new_tokens} tokens"),
)


class Failure(Exception):
    """Ends the program with its message, in one line."""


def ask(given: Namespace) -> int:
    """Answers ``given.question``, or what stdin asks line by line.

    Args:
        given: what ``__main__.parser`` makes of the command line.

    Returns:
        The exit code: 0; 1 if something was not answered.
    """
    try:
        for path in given.video:
            file_name(path)
        chat = _load(given)
        if given.seed is not None:
            torch.manual_seed(given.seed)
        if given.question is not None:
            _turn(chat, given, given.question, given.video)
            return 0
    except (Failure, *MENDABLE) as error:
        _say(error)
        return 1
    return _converse(chat, given)


def _load(given: Namespace):
    """The ``VideoChat`` of ``given.model``."""
    device = _device(given.device)
    if given.compile is not None and device.type == "cpu":
        raise Failure("--compile: got it for a CPU, want a --device that transformers compiles decode steps on")
    directory = given.model
    if not os.path.isfile(os.path.join(directory, "config.json")):
        what = "no config.json in it" if os.path.isdir(directory) else "no such directory"
        raise Failure(f"--model: got {directory} ({what}), want a directory that a model's save_pretrained wrote")
    from safetensors import SafetensorError

    from .hf import PRESETS, VideoChat  # transformers takes seconds, and is an extra

    _quieten()
    preset = None if given.preset is None else PRESETS[given.preset]
    options = ({} if preset is None else dict(preset.generate)) | _sampling(given)
    if given.max_new_tokens is not None:
        options["max_new_tokens"] = given.max_new_tokens
    settings = {"num_frames": given.frames, "system": given.system} | ({} if preset is None else dict(preset.frames))
    if given.fps is not None:
        settings["fps"] = given.fps
    if given.compile is not None:
        settings["static_rows"] = given.compile
    try:
        return VideoChat.from_pretrained(directory, device=device, dtype=given.dtype, **settings, **options)
    except torch.OutOfMemoryError:
        raise
    except (*MENDABLE, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise Failure(f"--model: got {directory}, which cannot be read: {error}") from error


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Failure(f"--device: got {name}, want one that torch has here: {str(error).splitlines()[0]}") from error
    return device


def _sampling(given: Namespace) -> dict:
    """What ``generate`` takes of it; what the user says nothing about is the model's."""
    if given.temperature == 0:
        return {"do_sample": False}
    options = {"temperature": given.temperature, "top_p": given.top_p}
    options = {name: value for name, value in options.items() if value is not None}
    return options | {"do_sample": True} if options else {}


def _quieten() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


# ------------------------------------------------------------------------------------------------------- turns


def _converse(chat, given: Namespace) -> int:
    """One turn a line of stdin, until it ends."""
    shows_prompt = sys.stdin.isatty() and sys.stdout.isatty()
    if shows_prompt:
        import readline  # noqa: F401 - edits lines of input()

        print(f"Ctrl-D ends; {COMMANDS}", file=sys.stderr)
    videos, code = list(given.video), 0
    while True:
        try:
            line = input("> " if shows_prompt else "").strip()
        except EOFError:
            return code
        try:
            if line.startswith("/"):
                videos.append(_command(line))
            elif line:
                taken, videos = videos, []
                with _interrupt_ends_answer(chat):
                    _turn(chat, given, line, taken)
        except (Failure, *MENDABLE) as error:
            _say(error)
            code = 1


def _command(line: str) -> str:
    """The path in /video PATH."""
    name, _, path = line.partition(" ")
    if name != "/video" or not path.strip():
        raise Failure(f"got {line}, want a question or {COMMANDS}")
    return file_name(path.strip())


def _turn(chat, given: Namespace, question: str, videos: list[str]) -> None:
    progress = _Progress()
    try:
        answer = chat.ask(
            question,
            videos,
            on_text=None if given.json else progress.before(lambda text: print(text, end="", flush=True)),
            on_progress=progress if sys.stderr.isatty() else None,
        )
    finally:
        progress.clear()
    if given.json:
        print(json.dumps({"answer": answer.text, "timings": answer.timings, "counts": answer.counts}), flush=True)
    else:
        print(flush=True)
    if given.timings:
        print(timings_table(answer.timings, answer.counts), file=sys.stderr)


@contextmanager
def _interrupt_ends_answer(chat) -> Iterator[None]:
    """Ctrl-C ends the answer alone; a second one, or one where nothing is generated, the program."""

    def stop(number, frame) -> None:
        chat.stop()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------------ what is said


class _Progress:
    """How far a stage is, on one line of stderr that is written over."""

    def __init__(self) -> None:
        self._shown = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        text = f"{stage.replace('_', ' ')}: {min(100, 100 * done // max(total, 1))}%"
        if text != self._shown:
            self._write(text)

    def clear(self) -> None:
        if self._shown:
            self._write("")

    def before(self, write):
        """``write``, on a cleared line."""

        def cleared(text: str) -> None:
            self.clear()
            write(text)

        return cleared

    def _write(self, text: str) -> None:
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        self._shown = text


def timings_table(timings: dict[str, float | None], counts: dict[str, int]) -> str:
    """Lines of what ``Answer`` says."""
    lines = []
    for name, title, note in _LINES:
        seconds = timings[name]
        value = "-" if seconds is None else f"{seconds:.4f} s"
        lines.append(f"{title:<14}{value:>12}   {note.format(**counts)}".rstrip())
    rate, memory = timings["tokens_per_second"], timings["peak_memory_bytes"]
    if rate is not None:
        lines[-1] += f", {rate:.1f} tokens/s"
    if memory is not None:
        lines.append(f"{'peak memory':<14}{memory / 1e9:>9.2f} GB")
    return "\n".join(lines)


def _say(error: BaseException) -> None:
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        text = f"out of memory (a conversation starts again), want fewer --frames or a smaller --dtype: {text}"
    print(f"python -m slowfast_model ask: error: {text}", file=sys.stderr)
