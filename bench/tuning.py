"""What the sweeps of ``tune_cuda`` and ``tune_triton`` share: shapes, checked answers, timing, the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from .inputs import AttentionInputs, reference_context, reference_mixed
from .shapes import AttentionShape, parse_attention
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
    """(microseconds, config), the best first.

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


def run(
    description: str,
    tune: Callable[[AttentionShape, torch.device, float], dict],
    show: Callable[[dict], str],
    prepare: Callable[[list[AttentionShape], torch.device], None] | None = None,
    **versions: str,
) -> None:
    """The command line of a sweep: ``tune(shape, device, seconds a config)`` for every shape asked for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write every measurement to this JSON file")
    parser.add_argument("--shapes", nargs="+", default=TABLE, help="BATCHxTEXTxSLOW[@HQ/HKV/D]")
    parser.add_argument("--budget", type=float, default=0.02, help="seconds of measurement a configuration")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    shapes = [parse_attention(text) for text in arguments.shapes]
    if None in shapes:
        parser.error(f"--shapes: got {arguments.shapes}, want BATCHxTEXTxSLOW[@HQ/HKV/D]")
    device = torch.device("cuda", torch.cuda.current_device())
    if prepare is not None:
        prepare(shapes, device)
    entries = []
    for shape in shapes:
        print(shape.name, flush=True)
        entries.append(tune(shape, device, arguments.budget))
        print(show(entries[-1]), flush=True)
        if arguments.out:
            report = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__} | versions
            arguments.out.write_text(json.dumps(report | {"shapes": entries}, indent=1))
