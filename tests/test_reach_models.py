"""Other models that read images or video by cross-attention, served by the same ops through visible ranges and merging.

Each layer here is written from what its model computes (not from its code) around an attention that is given to it:
ours, or the one under a dense mask in float64 that it is held to, outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reach_cases import DIM, HEADS, Reading, between, dense_attention
from targets import ALL
from test_ops_backward import assert_gradients_accurate
from torch import Tensor

import slowfast_kernels as sk

NUM_Q, NUM_KV = HEADS
SCALE = DIM**-0.5
FRAMES, TOKENS = 4, 7  # a frame or image is so many tokens
SLOW = FRAMES * TOKENS
# Frames that had come when each text token was written. The last row of the second sequence is padding, whose mask
# falls back to nothing; its video starts in the middle of the text and has not ended with it.
FRAMES_SEEN = torch.tensor([[1, 1, 2, 2, 3, 4, 4, 4], [0, 0, 0, 1, 2, 2, 3, 0]])
BATCH, TEXT = FRAMES_SEEN.shape


def normals(target, generator, *sizes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(size, generator=generator, device=target.device).to(target.dtype) for size in sizes]


Q, MEDIA_KV, TEXT_KV = (BATCH * TEXT, NUM_Q, DIM), (BATCH * SLOW, NUM_KV, 2, DIM), (BATCH * TEXT, NUM_KV, 2, DIM)


def padded(x: Tensor) -> Tensor:
    return x.unflatten(0, (BATCH, -1))


def windows(frames_seen: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """(begin, end) [B, n] of what a row sees, by the model that wants it so."""
    seen = frames_seen * TOKENS
    return {
        "a prefix that grows (MOSS-VL, mPLUG-Owl3 240728, Idefics)": (torch.zeros_like(seen), seen),
        "the last image only (OpenFlamingo)": (seen - TOKENS, seen),  # before the first image: begins below 0
        "the last two images": (seen - 2 * TOKENS, seen),
        "from the last image on": (seen - TOKENS, torch.full_like(seen, 10**6)),  # clamped at both ends
    }


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("window", windows(FRAMES_SEEN))
def test_a_window_of_images_equals_the_dense_mask(target, window, rng):
    begin, end = (x.to(target.device) for x in windows(FRAMES_SEEN)[window])
    reading = Reading.of_padded(BATCH, TEXT, SLOW, target.device, slow_begin=begin, slow_end=end)
    sees = between(begin, end, SLOW)

    def ours(q, kv):
        return [target.run(sk.text_cross_attention, q, kv, *reading.places, **reading.selection)]

    def dense(q, kv):
        keys, values = padded(kv).unbind(3)
        return [dense_attention(padded(q), keys, values, sees, SCALE).flatten(0, 1)]

    inputs = normals(target, rng(target.device), Q, MEDIA_KV)
    assert_outputs_accurate(ours, dense, inputs)
    assert_gradients_accurate(ours, dense, inputs, rng(target.device))


def assert_outputs_accurate(ours: Callable, dense: Callable, inputs: Sequence[Tensor]) -> None:
    """To 1e-5 in float32, and else to four roundings of the largest value: of probabilities, context and output."""
    (got,), (want,) = ours(*inputs), dense(*(x.double() for x in inputs))
    tolerance = 1e-5 if got.dtype == torch.float32 else 4 * torch.finfo(got.dtype).eps
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))


# ---------------------------------------------------------------------------------------------- MOSS-VL


def moss_layer(attend: Callable, hidden, frames, q_weight, kv_weight, o_weight, gate):
    """A layer of its own between two of the language model: hidden + tanh(gate) o_proj(attention to the frames)."""
    q = F.linear(hidden, q_weight).unflatten(1, (NUM_Q, DIM))
    kv = F.linear(frames, kv_weight).unflatten(1, (NUM_KV, 2, DIM))
    return hidden + gate.tanh() * F.linear(attend(q, kv).flatten(1), o_weight)


def moss_inputs(target, rng, channels: int = 24) -> list[Tensor]:
    width = NUM_Q * DIM
    weights = (width, channels), (2 * NUM_KV * DIM, channels), (channels, width)
    rows, tokens = (BATCH * TEXT, channels), (BATCH * SLOW, channels)
    hidden, frames, *projections, gate = normals(target, rng(target.device), rows, tokens, *weights, (1,))
    return [hidden, frames, *(weight * weight.shape[1] ** -0.5 for weight in projections), 0.5 + gate.abs()]


def moss_attentions(target) -> tuple[Callable, Callable]:
    """(ours, dense): text rows see the frames that had come; rows before the first see nothing."""
    end = FRAMES_SEEN.to(target.device) * TOKENS
    reading = Reading.of_padded(BATCH, TEXT, SLOW, target.device, slow_end=end)
    sees = between(torch.zeros_like(end), end, SLOW)

    def ours(q, kv):
        return target.run(sk.text_cross_attention, q, kv, *reading.places, **reading.selection)

    def dense(q, kv):
        keys, values = padded(kv).unbind(3)
        return dense_attention(padded(q), keys, values, sees, SCALE).flatten(0, 1)

    return ours, dense


FLOAT32_ONLY = [param for param in ALL if param.values[0].dtype == torch.float32]  # projections round on the way


@pytest.mark.parametrize("target", FLOAT32_ONLY)
def test_a_moss_vl_layer_equals_the_dense_mask_with_gradients_of_all_its_weights(target, rng):
    ours, dense = (partial(lambda attend, *args: [moss_layer(attend, *args)], way) for way in moss_attentions(target))
    inputs = moss_inputs(target, rng)
    assert_outputs_accurate(ours, dense, inputs)
    assert_gradients_accurate(ours, dense, inputs, rng(target.device))


@pytest.mark.parametrize("target", ALL)
def test_rows_before_the_first_frame_leave_a_moss_vl_layer_as_they_came(target, rng):
    ours, _ = moss_attentions(target)
    hidden, *rest = moss_inputs(target, rng)
    is_blind = (FRAMES_SEEN == 0).flatten().to(target.device)
    out = moss_layer(ours, hidden, *rest)
    assert torch.equal(out[is_blind], hidden[is_blind])
    assert not (out[~is_blind] == hidden[~is_blind]).all(1).any()


# -------------------------------------------------------------------------------------------- mPLUG-Owl3


def owl_attentions(target) -> tuple[Callable, Callable]:
    """(ours, dense) of one softmax over [media ; text]: the media before the row, and the text up to it.

    Ours attends twice, the text's own K and V being slow tokens of which row i sees i + 1, and merges.
    """
    end = FRAMES_SEEN.to(target.device) * TOKENS
    causal = torch.arange(1, TEXT + 1, device=target.device).expand(BATCH, -1)
    media = Reading.of_padded(BATCH, TEXT, SLOW, target.device, slow_end=end)
    text = Reading.of_padded(BATCH, TEXT, TEXT, target.device, slow_end=causal)
    sees = torch.cat([between(torch.zeros_like(x), x, n) for x, n in ((end, SLOW), (causal, TEXT))], 2)

    def ours(q, media_kv, text_kv):
        attend = partial(target.run, sk.text_cross_attention, q, return_lse=True)
        parts = [*attend(media_kv, *media.places, **media.selection), *attend(text_kv, *text.places, **text.selection)]
        return target.run(sk.merge_attention, *parts)

    def dense(q, media_kv, text_kv):
        keys, values = torch.cat([padded(media_kv), padded(text_kv)], 1).unbind(3)
        return dense_attention(padded(q), keys, values, sees, SCALE).flatten(0, 1)

    return ours, dense


@pytest.mark.parametrize("target", ALL)
def test_one_softmax_over_media_and_text_is_two_calls_merged(target, rng):
    ours, dense = owl_attentions(target)
    inputs = normals(target, rng(target.device), Q, MEDIA_KV, TEXT_KV)
    assert_outputs_accurate(lambda *x: [ours(*x)[0]], lambda *x: [dense(*x)], inputs)


@pytest.mark.parametrize("target", FLOAT32_ONLY)  # in half precision the two contexts are rounded before they merge
def test_gradients_of_one_softmax_over_media_and_text_flow_through_the_merge(target, rng):
    ours, dense = owl_attentions(target)
    inputs = normals(target, rng(target.device), Q, MEDIA_KV, TEXT_KV)
    assert_gradients_accurate(lambda *x: [ours(*x)[0]], lambda *x: [dense(*x)], inputs, rng(target.device))
