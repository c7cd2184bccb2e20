"""What sweeps share: the command line; for ``tune_cuda`` and ``tune_triton`` also shapes, checked answers, timing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from .inputs import AttentionInputs, make_inputs, reference_context, reference_mixed
from .selection import parse_attention
from .shapes import AttentionShape
from .timing import time_calls

TABLE = [
    "1x1x5184", "1x1x10368", "1x1x98304", "16x1x10368", "1x64x5184", "1x64x10368", "1x256x10368", "8x64x10368",
    "1x64x98304", "1x256x98304", "1x1024x98304",
]  # fmt: skip

Config = TypeVar("Config")


def sweep(
    configs: Sequence[Config],
    fused: Callable[[Config, AttentionInputs], Tensor],
    sets: Sequence[AttentionInputs],
    device: torch.device,
    budget_s: float,
) -> list[tuple[float, Config]]:
    """(microseconds, config), the best first, of configs that start with the heuristic's.

    The first config's answer is held to the float32 reference and the others' to the first's: AssertionError if wrong.
    """
    shape = sets[0].shape
    answer = fused(configs[0], sets[0]).float()
    expected = reference_mixed(sets[0], reference_context(sets[0]))
    tolerance = 2 * float((expected.bfloat16().float() - expected).abs().max())  # two roundings of the largest value
    error = float((answer - expected).abs().max())
    if not error <= tolerance:
        raise AssertionError(f"{shape.name}: {configs[0]} is wrong by {error:.3g}, allowed is {tolerance:.3g}")
    del expected

    def time(config: Config) -> float:
        difference = float((fused(config, sets[0]).float() - answer).abs().max())
        if not difference <= 2 * tolerance:
            raise AssertionError(f"{shape.name}: {config} differs from {configs[0]} by {difference:.3g}")
        return time_calls([partial(fused, config, s) for s in sets], device, budget_s).median_us

    return sorted(((time(config), config) for config in configs), key=lambda row: row[0])


def report(rows: list[tuple[float, Config]], own: Config) -> dict:
    """What ``sweep`` found, for the JSON file; ``own`` is what the heuristic chooses."""
    timed = [{"us": us, **asdict(config)} for us, config in rows]
    return {"heuristic": timed[[config for _, config in rows].index(own)], "best": timed[0], "all": timed}


def command_line(description: str) -> argparse.ArgumentParser:
    """Of any sweep; what it sweeps over is its own to add."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write every measurement to this JSON file")
    parser.add_argument("--budget", type=float, default=0.02, help="seconds of measurement a configuration")
    return parser


def the_gpu(parser: argparse.ArgumentParser) -> torch.device:
    """The current one; without one the program ends."""
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    return torch.device("cuda", torch.cuda.current_device())


def write(out: Path | None, device: torch.device, **found) -> None:
    """What was found so far, to the file that was asked for."""
    if out:
        result = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__} | found
        out.write_text(json.dumps(result, indent=1))


def run(
    description: str,
    tune: Callable[[list[AttentionInputs], torch.device, float], dict],
    show: Callable[[dict], str],
    prepare: Callable[[list[AttentionShape], torch.device], None] | None = None,
    shapes: Sequence[str] = TABLE,
    **versions: str,
) -> None:
    """The command line of a sweep: ``tune(input sets, device, seconds a config)`` for every shape asked for, or else
    ``shapes``."""
    parser = command_line(description)
    parser.add_argument("--shapes", nargs="+", default=shapes, help="BATCHxTEXTxSLOW[@HQ/HKV/D]")
    arguments = parser.parse_args()
    device = the_gpu(parser)
    try:
        asked = [parse_attention(text) for text in arguments.shapes]
    except ValueError as problem:
        parser.error(f"--shapes: got {problem}")
    if None in asked:
        parser.error(f"--shapes: got {arguments.shapes}, want BATCHxTEXTxSLOW[@HQ/HKV/D]")
    facts = torch.cuda.get_device_properties(device)
    if prepare is not None:
        prepare(asked, device)
    entries = []
    for shape in asked:
        print(shape.name, flush=True)
        sets = make_inputs(shape, "bfloat16", device, facts.L2_cache_size)
        entries.append({"shape": shape.name} | tune(sets, device, arguments.budget))
        print(show(entries[-1]), flush=True)
        write(arguments.out, device, **versions, shapes=entries)
