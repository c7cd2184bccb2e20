"""Time attention's gradients by CUDA and by Triton, for whole videos, videos in slabs and questions about one video.

    python -m bench.tune_backward [--out FILE] [--shapes 8x64x5184 ...] [--budget SECONDS]

For each shape, which is of even lengths: the backward pass alone by either, and which of them is the automatic choice.
Both must agree, and where sequences are not in pieces the first is held to the float32 reference. The crossovers in
``heuristics.cuda.hopper_backward_drawback`` come from this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import tuning
from .attention_backward import NAME, InParts
from .backward import BACKWARD, call_of, choices, named_arguments
from .inputs import AttentionInputs, reference_gradients
from .runner import relative_error
from .timing import time_calls

TABLE = [
    "1x8x2048", "1x64x648", "1x64x2048", "1x64x3240", "1x64x10368", "1x256x10368", "2x64x5184", "4x64x648", "4x64x5184",
    "4x256x10368", "8x8x2048", "8x64x648", "8x64x2048", "8x64x5184", "8x256x5184", "8x64x10368", "16x8x5184",
    "16x64x2048", "16x64x5184", "16x256x5184", "32x8x2048", "32x64x2048", "32x256x2048", "32x64x5184",
]  # fmt: skip
BACKENDS = ("cuda", "triton")
LAYOUTS = ("whole", "slabs", "one video")
SLAB_REST = 100  # tokens at the end of a slab that nobody has
TOLERANCE = 0.02  # of a gradient's norm: P and dS are rounded to bfloat16


def arguments(inputs: AttentionInputs, layout: str) -> dict[str, object]:
    q, slow_kv, cu_slow, *rows = inputs.attention
    batch, pieces = len(cu_slow) - 1, None
    if layout != "whole":
        tokens = slow_kv.shape[0] // batch
        if layout == "slabs":
            spans = [[b * tokens, b * tokens + max(1, tokens - SLAB_REST)] for b in range(batch)]
        else:
            slow_kv, spans = slow_kv[:tokens], [[0, tokens]] * batch
        pieces = torch.tensor(spans, dtype=torch.int32, device=q.device)
        cu_slow = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    return named_arguments(NAME, q, slow_kv, cu_slow, *rows, return_lse=True, slow_pieces=pieces)


def tune(sets: list[AttentionInputs], device: torch.device, budget_s: float) -> dict:
    upstream = [torch.randn_like(x.q) for x in sets]
    found: dict[str, dict[str, object]] = {}
    for layout in LAYOUTS[: 1 if sets[0].shape.batch == 1 else None]:
        given = [arguments(x, layout) for x in sets]
        found[layout] = {"chosen": choices(NAME, (), **given[0])[0].backward}
        expected: Sequence[Tensor] | None = None
        if layout == "whole":
            _, grad_q, *grad_kv = reference_gradients(sets[0], upstream[0])
            expected = grad_q, torch.stack(grad_kv, 2)
        for backend in BACKENDS:
            passes = (InParts(*each, None, backend) for each in zip(given, upstream, strict=True))
            calls = [call_of(each, BACKWARD) for each in passes]
            answer = calls[0]()
            expected = expected or answer
            error = max(relative_error(x, want) for x, want in zip(answer, expected, strict=True))
            if not error <= TOLERANCE:
                raise AssertionError(f"{sets[0].shape.name}, {layout}: {backend} is wrong by {error:.3g}")
            found[layout][f"{backend}_us"] = time_calls(calls, device, budget_s).median_us
    return found


def show(entry: dict) -> str:
    line = "  {layout:9}  cuda {cuda_us:7.1f} us  triton {triton_us:7.1f} us  chosen: {chosen}"
    return "\n".join(line.format(layout=layout, **entry[layout]) for layout in LAYOUTS if layout in entry)


if __name__ == "__main__":
    tuning.run(__doc__, tune, show, shapes=TABLE)
