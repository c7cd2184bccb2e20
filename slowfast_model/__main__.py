"""``python -m slowfast_model ask``: a question about a video, or a conversation."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

PRESETS = ("demo", "evaluation")  # of hf.PRESETS, whose import takes transformers
DTYPES = ("bfloat16", "float16", "float32")


class Parser(argparse.ArgumentParser):
    """Its errors are one line; the usage is for --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"got {text}, want a number >= 1")
    return int(text)


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}, want a number >= 0")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}, want a number > 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"got {text}, want a number > 0 and <= 1")
    return value


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m slowfast_model")
    ask = p.add_subparsers(dest="command", required=True).add_parser(
        "ask",
        help="ask a model about videos",
        description="Ask a model about videos. The answer goes to stdout as it is made. Without a question: a "
        "conversation, a line a turn; /video PATH gives the next question a video, Ctrl-C ends an answer, Ctrl-D the "
        "conversation. Exit codes: 0, 1 (an error, in one line), 2 (wrong arguments), 130 (Ctrl-C).",
    )
    ask.add_argument("question", nargs="?", help="left out: a conversation on stdin")
    ask.add_argument("--model", required=True, metavar="DIR", help="a directory with a model and its processor")
    ask.add_argument("--video", action="append", default=[], metavar="PATH", help="a video file; may be repeated")
    ask.add_argument(
        "--preset", choices=PRESETS, help="frames and sampling of the released code; what else is said holds"
    )
    ask.add_argument("--frames", type=_positive, metavar="N", help="frames of each video; default: the processor's")
    ask.add_argument("--fps", type=_rate, metavar="R", help="frames a second, at most --frames; default: evenly")
    ask.add_argument("--device", help="default: cuda if there is one, else cpu")
    ask.add_argument("--dtype", choices=DTYPES, help="default: as the model was saved")
    ask.add_argument(
        "--compile",
        type=_positive,
        metavar="ROWS",
        help="on a GPU: compile the decode step, over a cache with room for ROWS tokens of a conversation, answers "
        "too; compiling takes longer than a short answer",
    )
    ask.add_argument("--max-new-tokens", type=_positive, metavar="N", help="default: the model's, or 512")
    ask.add_argument(
        "--temperature", type=_temperature, metavar="T", help="0: the likeliest token each time; default: the model's"
    )
    ask.add_argument(
        "--top-p", type=_share, metavar="P", help="sample of the likeliest tokens, which make up P together"
    )
    ask.add_argument("--seed", type=int, help="of the sampling")
    ask.add_argument("--system", metavar="TEXT", help="a system message (default: the chat template's)")
    ask.add_argument("--timings", action="store_true", help="where the time went, on stderr")
    ask.add_argument(
        "--json", action="store_true", help="instead of text one JSON object a turn: answer, timings, counts"
    )
    return p


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    given = parser().parse_args(arguments)
    try:
        from .ask import ask

        return ask(given)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
