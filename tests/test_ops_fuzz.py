"""Many random ragged batches, each with poisoned padding, neighbours and slack, on the fused op and its parts.

SLOWFAST_FUZZ sets the number of batches a backend (default 60 on a CPU, 2000 on a GPU). References are computed on the
device and the verdicts are read back once at the end.
"""

from __future__ import annotations

import os
import random

import pytest
import reference
import torch
from cases import LAYOUTS, Shape, Video, make_frames, make_inputs, poison
from targets import HAS_GPU, KERNELS

import slowfast_kernels as sk

COUNT = int(os.environ.get("SLOWFAST_FUZZ", "2000" if HAS_GPU else "60"))
# Few head shapes: Triton compiles each one.
HEADS = [((28, 4), 128), ((14, 2), 64), ((8, 8), 64), ((16, 1), 128)]


def ragged(pick: random.Random) -> Shape:
    batch = pick.choice([1, 4])
    lengths = [(pick.choice([0, 1, 1, 3, 17]), pick.choice([0, 1, 15, 64, 65, 127, 200, 333])) for _ in range(batch)]
    heads, dim = pick.choice(HEADS)
    return Shape(tuple(lengths), heads, dim, pick.choice([0, 0, 5]))


def share(target) -> int:
    """Every backend gets COUNT batches, dealt out to its dtypes."""
    dtypes = sum(param.values[0].backend == target.backend for param in KERNELS)
    return -(-COUNT // dtypes)


def verdict(ratios: list[torch.Tensor], cases: list) -> None:
    """One look at the device for all cases; the worst one is named."""
    allowed = torch.stack([ratio.double() for ratio in ratios]).cpu()
    allowed[allowed.isnan()] = torch.inf
    worst = int(allowed.argmax())
    message = f"case {worst} of {len(cases)}: error is {float(allowed[worst]):.3g} x allowed for {cases[worst]}"
    assert allowed[worst] <= 1, message


@pytest.mark.slow
@pytest.mark.parametrize("target", KERNELS)
def test_cross_attention_on_random_ragged_batches(target, rng, seed):
    pick, generator = random.Random(seed), rng(target.device)
    ratios, cases, limits = [], [], []
    for _ in range(share(target)):
        shape, layout, num_splits = ragged(pick), pick.choice(LAYOUTS), pick.choice([0, 0, 1, 3])
        inputs = make_inputs(shape, target.dtype, target.device, generator, layout)
        victim = pick.randrange(len(shape.sequences))  # all other sequences are poisoned
        slow, text = (cu[victim : victim + 2].tolist() for cu in (inputs.cu_slow, inputs.cu_text))
        mine = inputs.slow_kv[slow[0] : slow[1]].clone()
        poison(inputs.slow_kv)[slow[0] : slow[1]] = mine
        rows = inputs.text_rows[text[0] : text[1]].long()
        try:
            out = target.run(sk.slowfast_cross_attention, *inputs.fused, num_splits=num_splits)
        except pytest.skip.Exception as limit:  # the cuda attention has layouts and dtypes that it leaves to triton
            limits.append(str(limit))
            continue
        alone = inputs.sequence(victim)
        plain = sk.slowfast_cross_attention(*alone.fused, backend="eager")
        exact = reference.attention(*alone.attention)
        mixed = reference.gated_mix(alone.state, exact.context, alone.text_rows, *alone.gating)
        ratios.append(reference.excess(out[rows], plain[rows], mixed[rows], exact.noise))
        ratios.append(out[inputs.other_rows].isfinite().any() * 2.0)  # they hold NaN and Inf
        cases += [(shape, layout, num_splits, victim)] * 2
    if not cases:
        pytest.skip(limits[0])
    assert len(cases) > len(limits), "most batches were refused"
    verdict(ratios, cases)


@pytest.mark.slow
@pytest.mark.parametrize("target", KERNELS)
def test_pool_on_random_videos(target, rng, seed):
    pick, generator = random.Random(seed), rng(target.device)
    ratios, cases = [], []
    for _ in range(share(target) // 2):
        side = pick.choice([1, 2, 3, 4, 6])
        pool_stride = pick.randint(1, side)
        video = Video(
            tuple(pick.choice([1, 2, 5, 9]) for _ in range(pick.choice([1, 2, 3]))),
            (side, side),
            pick.choice([1, 8, 40, 256]),
            pool_stride,
            pick.randint(1, 3),
            pick.randint(1, 4),
            pick.randint(1, side // pool_stride),
            pick.randint(1, 4),
        )
        frames = make_frames(video, target.dtype, target.device, generator, pick.choice(LAYOUTS))
        counts, norm_eps = list(video.frame_counts), pick.choice([None, 1e-6])
        found = target.run(sk.slowfast_pool, frames, counts, video.grid, **video.strides, norm_eps=norm_eps)
        plain = sk.slowfast_pool(frames, counts, video.grid, **video.strides, norm_eps=norm_eps, backend="eager")
        slow, _, fast, _ = reference.pool(frames, counts, video.grid, *video.strides.values(), norm_eps)
        ratios += [reference.excess(found.slow, plain.slow, slow), reference.excess(found.fast, plain.fast, fast)]
        cases += [(video, norm_eps, "slow"), (video, norm_eps, "fast")]
    verdict(ratios, cases)
