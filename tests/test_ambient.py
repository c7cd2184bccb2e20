"""What a caller has set for the whole process does not reach in: the default type, the default device."""

from __future__ import annotations

import pytest
import reference
import torch
from ambient import default_type
from cases import Shape, Video, make_frames, make_inputs
from model_cases import VIDEO, features, one_thread, tiny_model  # noqa: F401  the fixture of this module

import slowfast_kernels as sk
from slowfast_model import DecodeSession, PatchTower, encode_frames

CPU = torch.device("cpu")


AMBIENT = {
    "float64": lambda: default_type(torch.float64),
    "bfloat16": lambda: default_type(torch.bfloat16),
    "another device": lambda: torch.device("meta"),  # as a GPU would be: what is made on it does not meet the CPU's
}
everywhere = pytest.mark.parametrize("ambient", AMBIENT)


def tensors_of(x) -> list[torch.Tensor]:
    return [x] if isinstance(x, torch.Tensor) else [each for part in x if part is not None for each in tensors_of(part)]


def check(run, ambient):
    """``run()`` gives the same bits of the same types as without."""
    expected = tensors_of(run())
    with AMBIENT[ambient]():
        found = tensors_of(run())
    assert [(x.dtype, x.device) for x in found] == [(x.dtype, x.device) for x in expected]
    assert all(reference.same_bits(x, y) for x, y in zip(found, expected, strict=True))


def with_gradients(result, *inputs):
    """``result`` and the gradients of its floating-point parts' squares."""
    parts = [x for x in tensors_of(result) if x.requires_grad]
    return result, torch.autograd.grad(sum(x.float().pow(2).sum() for x in parts), inputs)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_ops_and_gradients_are_what_they_are_without(backend, dtype, ambient, rng):
    inputs = make_inputs(Shape(((300, 70), (2, 0), (5, 33))), dtype, CPU, rng())
    frames = make_frames(Video((7, 2), (4, 4), 16, 2, 1, 2, 2), dtype, CPU, rng()).requires_grad_()
    state, q, kv, *places = (inputs.state, *inputs.attention)
    gating = [x.requires_grad_() for x in inputs.gating]
    leaves = [x.requires_grad_() for x in (state, q, kv)]
    ends = torch.arange(len(inputs.text_rows), dtype=torch.int32) % 40

    def fused():
        out = sk.slowfast_cross_attention(*leaves, *places, *gating, slow_end=ends, backend=backend)
        return with_gradients(out, *leaves, *gating)

    def mixed():
        context, lse = sk.text_cross_attention(*leaves[1:], *places, return_lse=True, backend=backend)
        context, _ = sk.merge_attention(context, lse, context * 2, lse - 1, backend=backend)
        out = sk.gated_residual_mix(state, context.flatten(1), inputs.text_rows, *gating, backend=backend)
        return with_gradients(out, *leaves, *gating)

    def pooled():
        strides = {"pool_stride": 2, "temporal_stride": 2, "min_fast_frames": 2, "norm_eps": 1e-6}
        return with_gradients(sk.slowfast_pool(frames, [7, 2], (4, 4), **strides, backend=backend), frames)

    for run in (fused, mixed, pooled):
        check(run, ambient)


@everywhere
def test_a_model_computes_and_trains_as_it_does_without(ambient):
    model, videos = tiny_model(None, causal_slow_tokens=True), features((4, 4), (2, 4))
    ids = torch.tensor([[1, VIDEO, 2, 3], [4, 5, VIDEO, 6]])

    def step():
        out = model(ids, videos, labels=ids.clamp(min=0))
        return out.logits, torch.autograd.grad(out.loss, [p for p in model.parameters() if p.requires_grad])

    def decode():
        session = DecodeSession(model, ids, videos, max_new_tokens=40)
        first = session.step(session.logits.argmax(-1))
        return first, session.extend(torch.tensor([[7, VIDEO, 8], [9, VIDEO, 1]], device="cpu"), videos)

    for run in (step, decode, lambda: model.generate(ids, frame_features=videos, max_new_tokens=4)):
        check(run, ambient)


@everywhere
def test_frames_are_encoded_as_without(ambient):
    tower = PatchTower(12, grid=4)
    frames = torch.randint(256, (3, 20, 30, 3), dtype=torch.uint8)
    check(lambda: encode_frames(tower, frames), ambient)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_may_be_of_another_half_type_than_the_weights(weights):
    other = torch.float16 if weights == torch.bfloat16 else torch.bfloat16
    model, videos = tiny_model(None), features((4, 4))
    ids = torch.tensor([[1, VIDEO, 2, 3]])
    exact = model(ids, videos).logits
    model, videos = model.to(weights), [x.to(weights) for x in videos]
    with torch.autocast("cpu", dtype=other):
        out = model(ids, videos, labels=ids.clamp(min=0))
        out.loss.backward()
        model.generate(ids, frame_features=videos, max_new_tokens=3)
    assert (out.logits - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(p.grad.dtype == weights and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
