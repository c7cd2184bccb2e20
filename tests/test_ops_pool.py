"""slowfast_pool: slow tokens (normalised) and fast tokens of videos and images."""

from itertools import accumulate

import pytest
import reference
import torch
from cases import LAYOUTS, VIDEOS, Video, make_frames, poison
from hypothesis import given
from hypothesis import strategies as st
from targets import ALL, KERNELS, REPEATS

import slowfast_kernels as sk


def pool(target, frames, video, **options):
    return target.run(sk.slowfast_pool, frames, list(video.frame_counts), video.grid, **video.strides, **options)


def check(target, frames, video, norm_eps):
    found = pool(target, frames, video, norm_eps=norm_eps)
    counts, strides = list(video.frame_counts), video.strides
    plain = sk.slowfast_pool(frames, counts, video.grid, **strides, norm_eps=norm_eps, backend="eager")
    slow, num_slow, fast, num_fast = reference.pool(frames, counts, video.grid, *strides.values(), norm_eps)
    reference.assert_accurate(found.slow, plain.slow, slow)
    reference.assert_accurate(found.fast, plain.fast, fast)
    for cu, counts in ((found.cu_slow, num_slow), (found.cu_fast, num_fast)):
        assert cu.dtype == torch.int32
        assert cu.device == frames.device
        assert cu.tolist() == [0, *accumulate(counts)]


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("norm_eps", [None, 1e-6], ids=["plain", "norm"])
@pytest.mark.parametrize("video", VIDEOS, ids=str)
def test_tokens_are_accurate(target, video, norm_eps, rng):
    check(target, make_frames(video, target.dtype, target.device, rng(target.device)), video, norm_eps)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_frames_may_have_any_strides_with_a_contiguous_last_dimension(target, layout, rng):
    video = VIDEOS[3]
    frames = make_frames(video, target.dtype, target.device, rng(target.device), layout)
    assert not frames.is_contiguous()
    check(target, frames, video, 1e-6)


@st.composite
def videos(draw, largest_side=9, most_frames=12):
    side = draw(st.integers(1, largest_side))
    pool_stride = draw(st.integers(1, side))
    return Video(
        frame_counts=tuple(draw(st.lists(st.integers(1, most_frames), min_size=1, max_size=3))),
        grid=(side, side),
        channels=draw(st.sampled_from([1, 8, 20, 64])),
        pool_stride=pool_stride,
        sampling_stride=draw(st.integers(1, 4)),
        temporal_stride=draw(st.integers(1, 5)),
        spatial_stride=draw(st.integers(1, side // pool_stride)),
        min_fast_frames=draw(st.integers(1, 5)),
    )


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize(("channels", "width"), [(64, 65), (60, 64)], ids=["odd rows", "odd channels"])
def test_frames_may_be_some_channels_of_wider_rows(target, channels, width, rng):
    """Frames begin at multiples of 16 bytes in either case; of the tokens, or of the channels, 16 bytes are no unit."""
    video = Video((3, 1), (4, 4), channels, 2, 1, 2, 1)
    wide = make_frames(video._replace(channels=width), target.dtype, target.device, rng(target.device))
    wide[..., channels:] = float("nan")
    check(target, wide[..., :channels], video, 1e-5)


@pytest.mark.parametrize("target", KERNELS)
@given(video=videos(), layout=st.sampled_from(LAYOUTS), norm_eps=st.sampled_from([None, 1e-5]))
def test_random_videos_are_accurate(target, rng, video, layout, norm_eps):
    check(target, make_frames(video, target.dtype, target.device, rng(target.device), layout), video, norm_eps)


@pytest.mark.parametrize("target", ALL)
def test_without_pooling_and_norm_the_slow_tokens_are_the_frames_bit_for_bit(target, rng):
    video = Video((5, 1), (4, 4), 24, temporal_stride=2)
    frames = make_frames(video, target.dtype, target.device, rng(target.device))
    assert reference.same_bits(pool(target, frames, video).slow, frames.flatten(0, 1))


@pytest.mark.parametrize("target", ALL)
def test_norm_eps_keeps_zero_tokens_zero_and_takes_no_part_otherwise(target, rng):
    video = Video((2,), (3, 3), 64)
    frames = make_frames(video, target.dtype, target.device, rng(target.device))
    frames[1] = 0
    slow = pool(target, frames, video, norm_eps=1e-6).slow.float()
    assert torch.equal(slow[9:], torch.zeros_like(slow[9:]))
    torch.testing.assert_close(slow[:9].pow(2).mean(-1), torch.ones(9, device=slow.device), atol=0.02, rtol=0)


@pytest.mark.parametrize("target", ALL)
def test_fast_tokens_are_not_normalised(target, rng):
    video = VIDEOS[2]
    frames = make_frames(video, target.dtype, target.device, rng(target.device))
    assert reference.same_bits(pool(target, frames, video, norm_eps=1e-6).fast, pool(target, frames, video).fast)


@pytest.mark.parametrize("target", ALL)
def test_dropped_rows_and_columns_are_never_read(target, rng):
    video = Video((4,), (5, 5), 16, pool_stride=2, temporal_stride=2)
    frames = make_frames(video, target.dtype, target.device, rng(target.device))
    clean = pool(target, frames, video, norm_eps=1e-6)
    by_cell = frames.unflatten(1, (5, 5))
    poison(by_cell[:, 4]), poison(by_cell[:, :, 4])
    dirty = pool(target, frames, video, norm_eps=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("target", ALL)
def test_poisoned_videos_do_not_reach_their_neighbours(target, rng):
    video = Video((4, 3, 5), (4, 4), 16, pool_stride=2, temporal_stride=2)
    frames = make_frames(video, target.dtype, target.device, rng(target.device))
    clean = pool(target, frames, video, norm_eps=1e-6)
    poison(frames[4:7])
    dirty = pool(target, frames, video, norm_eps=1e-6)
    for name in ("slow", "fast"):
        begin, end = getattr(clean, f"cu_{name}").tolist()[1:3]
        before, after = getattr(clean, name), getattr(dirty, name)
        assert torch.equal(torch.cat([before[:begin], before[end:]]), torch.cat([after[:begin], after[end:]]))
        assert not torch.isfinite(after[begin:end]).any()


@pytest.mark.parametrize("target", ALL)
def test_the_result_is_new_and_inputs_are_not_modified(target, rng):
    video = Video((1,), (4, 4))
    frames = make_frames(video, target.dtype, target.device, rng(target.device))
    before = frames.clone()
    storages = {x.untyped_storage().data_ptr() for x in pool(target, frames, video)}
    assert len(storages) == 4
    assert frames.untyped_storage().data_ptr() not in storages
    assert reference.same_bits(frames, before)


@pytest.mark.parametrize("target", ALL)
def test_prefix_sums_belong_to_the_caller(target, rng):
    frames = make_frames(VIDEOS[2], target.dtype, target.device, rng(target.device))
    expected = pool(target, frames, VIDEOS[2]).cu_slow.tolist()
    pool(target, frames, VIDEOS[2]).cu_slow.fill_(7)
    assert pool(target, frames, VIDEOS[2]).cu_slow.tolist() == expected


@pytest.mark.parametrize("target", KERNELS)
def test_same_input_same_bits(target, rng):
    frames = make_frames(VIDEOS[3], target.dtype, target.device, rng(target.device))
    first = pool(target, frames, VIDEOS[3], norm_eps=1e-6)
    for _ in range(REPEATS):
        again = pool(target, frames, VIDEOS[3], norm_eps=1e-6)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("target", KERNELS)
def test_a_video_has_the_same_bits_alone_and_in_a_batch(target, rng):
    video = Video((4, 3, 5), (4, 4), 40, pool_stride=2, temporal_stride=2)
    frames = make_frames(video, target.dtype, target.device, rng(target.device))
    batched = pool(target, frames, video, norm_eps=1e-6)
    alone = pool(target, frames[4:7], video._replace(frame_counts=(3,)), norm_eps=1e-6)
    assert torch.equal(alone.slow, batched.slow[batched.cu_slow[1] : batched.cu_slow[2]])
    assert torch.equal(alone.fast, batched.fast[batched.cu_fast[1] : batched.cu_fast[2]])
