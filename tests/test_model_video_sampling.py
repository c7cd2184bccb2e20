"""Which frames load_video takes, by index, by time and at a rate, and when it says that they are shown."""

from __future__ import annotations

import decimal
import fractions

import numpy as np
import pytest
import torch
from video_clips import brightness, shades, show_part, write_clip

from slowfast_model import load_video

UNEVEN = [0, 1, 2, 10, 11, 30, 31, 32, 50, 90]  # tenths of a second


@pytest.fixture
def uneven(tmp_path):
    """Ten frames on screen from UNEVEN / 10 seconds on."""
    return write_clip(tmp_path / "uneven.mp4", len(UNEVEN), times=UNEVEN)


@pytest.fixture
def even(tmp_path):
    """Forty frames at 10 a second."""
    return write_clip(tmp_path / "even.mp4", 40)


def indices(frames, total=40):
    """Frame numbers of a rising sample, whose brightness tells them modulo 14."""
    found, last = [], 0
    for shade in brightness(frames):
        last = next(i for i in range(last, total) if i % 14 == shade)
        found.append(last)
    return found


@pytest.mark.parametrize("num_frames", [1, 2, 4, 7, 10, 25])
def test_by_time_takes_the_frame_on_screen_at_evenly_spaced_times(uneven, num_frames):
    times = [fractions.Fraction(90 * k, max(1, num_frames - 1)) for k in range(num_frames)]
    on_screen = [max(i for i, start in enumerate(UNEVEN) if start <= t) for t in times]
    assert brightness(load_video(uneven, num_frames, by="time")) == on_screen


@pytest.mark.parametrize("suffix", [".mkv", ".avi", ".mov", ".ts", ".gif"])
def test_by_time_in_other_containers(tmp_path, suffix):
    coding = {"codec": "gif", "pixels": "rgb8"} if suffix == ".gif" else {}
    path = write_clip(tmp_path / f"clip{suffix}", 10, times=UNEVEN, **coding)
    assert brightness(load_video(path, 4, by="time")) == [0, 5, 8, 9]


@pytest.mark.parametrize("num_frames", [2, 3, 14, 40])
def test_by_time_is_by_index_where_the_rate_is_constant(even, num_frames):
    assert torch.equal(load_video(even, num_frames, by="time"), load_video(even, num_frames))


@pytest.mark.parametrize(("rate", "frames"), [(25, 51), (30, 61), (24, 49)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_every_frame_is_found_at_its_own_time(tmp_path, suffix, rate, frames):
    path = write_clip(tmp_path / f"clip{suffix}", frames, (16, 16), rate=rate)
    assert brightness(load_video(path, frames, by="time")) == shades(frames)


@pytest.mark.parametrize(
    ("fps", "step"), [(2, 5), (1, 10), (5, 2), (3, 3), (4, 2), (10, 1), (30, 1), (0.1, 100), (np.float32(2), 5)]
)
def test_a_rate_takes_every_so_manieth_frame(even, fps, step):
    assert indices(load_video(even, 64, fps=fps)) == list(range(0, 40, step))


@pytest.mark.parametrize(
    ("num_frames", "taken"), [(8, range(0, 40, 5)), (4, [5, 15, 25, 35]), (3, [10, 20, 35]), (1, [35])]
)
def test_past_num_frames_a_rate_is_thinned_as_the_released_evaluation_does(even, num_frames, taken):
    every = list(range(0, 40, 5))
    if num_frames < len(every):  # its rule, in its own floating point
        assert [every[round((i + 1) * (len(every) / num_frames) - 1)] for i in range(num_frames)] == list(taken)
    assert brightness(load_video(even, num_frames, fps=2)) == [i % 14 for i in taken]


def test_a_rate_by_time_takes_the_frame_on_screen_at_each_period(uneven):
    on_screen = [max(i for i, start in enumerate(UNEVEN) if start <= 10 * k) for k in range(10)]
    assert brightness(load_video(uneven, 64, fps=1, by="time")) == on_screen


@pytest.mark.parametrize("fps", [0.1, fractions.Fraction(1, 10), decimal.Decimal("0.1"), np.float64(0.1)])
def test_a_period_that_ends_on_a_frame_takes_that_frame(tmp_path, fps):
    path = write_clip(tmp_path / "slides.avi", 3, times=[0, 99, 100])  # stamps in tenths of a second
    assert brightness(load_video(path, 4, fps=fps, by="time")) == [0, 2]


def test_the_rate_of_a_trimmed_clip_is_that_of_what_is_shown(tmp_path):
    path = show_part(write_clip(tmp_path / "clip.mp4", 60), 1.0, 4.0)
    assert brightness(load_video(path, 64, fps=2)) == [i % 14 for i in range(10, 50, 5)]


def test_the_rate_of_an_avi_with_repeated_pictures_counts_those_displayed(tmp_path):
    path = write_clip(tmp_path / "clip.avi", 12, times=[0, 1, 2, 5, 6, 9, 10, 11, 15, 16, 17, 20])
    assert brightness(load_video(path, 64, fps=2)) == [
        0,
        3,
        6,
        9,
    ]  # 12 frames in 2.1 s, though the header says 10 a second


@pytest.mark.parametrize("fps", [1e-300, 1e-9, 1e9, 1e300])
@pytest.mark.parametrize("by", ["index", "time"])
def test_extreme_rates(uneven, fps, by):
    frames = load_video(uneven, 10, fps=fps, by=by)
    assert len(frames) == (1 if fps < 1 else 10)


def test_times_are_float64_seconds_of_the_frames_taken(uneven):
    frames, seconds = load_video(uneven, 4, by="time", return_times=True)
    assert seconds.dtype == torch.float64
    assert seconds.shape == (4,)
    assert len(frames) == 4
    assert seconds.tolist() == [0.0, 3.0, 5.0, 9.0]


def test_times_follow_the_files_own_clock(tmp_path):
    path = write_clip(tmp_path / "late.mkv", 5, times=[20, 21, 22, 23, 30])
    _, seconds = load_video(path, 5, return_times=True)
    assert seconds.tolist() == [2.0, 2.1, 2.2, 2.3, 3.0]


def test_times_of_a_trimmed_clip_begin_where_it_is_shown(tmp_path):
    path = show_part(write_clip(tmp_path / "clip.mp4", 60), 3.0, 2.0)
    _, seconds = load_video(path, 20, return_times=True)
    np.testing.assert_allclose(seconds, np.arange(20) / 10, atol=1e-9)


def test_times_of_a_stream_without_a_clock_count_at_its_rate(tmp_path):
    path = write_clip(tmp_path / "clip.h264", 10, codec="libx264", rate=25, codec_options={"bf": "2"})
    frames, seconds = load_video(path, 10, return_times=True)
    assert brightness(frames) == shades(10)
    np.testing.assert_allclose(seconds, np.arange(10) / 25)


def test_where_the_clock_is_set_back_it_goes_on_from_the_frame_before(tmp_path):
    path = write_clip(tmp_path / "clip.ts", 10, codec="libx264", codec_options={"bf": "0"})
    path.write_bytes(path.read_bytes() * 2)
    frames, seconds = load_video(path, 20, return_times=True)
    assert brightness(frames) == list(range(10)) * 2
    np.testing.assert_allclose(np.diff(seconds), 0.1)
    assert torch.equal(load_video(path, 20, by="time"), frames)


def test_frames_repeat_where_the_clip_has_fewer(tmp_path):
    path = write_clip(tmp_path / "one.mp4", 1)
    for by in ("index", "time"):
        frames, seconds = load_video(path, 3, by=by, return_times=True)
        assert brightness(frames) == [0, 0, 0]
        assert seconds.tolist() == [0.0, 0.0, 0.0]
    assert len(load_video(path, 3, fps=2)) == 1


@pytest.mark.parametrize("num_frames", [np.int64(3), np.uint8(3), torch.tensor(3)])
def test_integers_of_any_kind_count_frames(even, num_frames):
    assert len(load_video(even, num_frames)) == 3


@pytest.mark.parametrize("num_frames", [3.0, None, "3", True, np.float64(3), [3], torch.tensor([3])], ids=repr)
def test_a_number_of_frames_that_is_no_integer_is_refused(even, num_frames):
    with pytest.raises(TypeError, match="num_frames: got"):
        load_video(even, num_frames)


@pytest.mark.parametrize("num_frames", [0, -1, np.int64(0)])
def test_fewer_than_one_frame_is_refused(even, num_frames):
    with pytest.raises(ValueError, match="num_frames: got"):
        load_video(even, num_frames)


@pytest.mark.parametrize("fps", [0, -1, 0.0, float("nan"), float("inf"), -float("inf"), np.float32("nan")], ids=repr)
def test_a_rate_that_is_not_positive_and_finite_is_refused(even, fps):
    with pytest.raises(ValueError, match="fps: got"):
        load_video(even, fps=fps)


@pytest.mark.parametrize("fps", [True, "2", b"2", [2], 2j, np.bool_(True), torch.tensor([2.0])], ids=repr)
def test_a_rate_that_is_no_number_is_refused(even, fps):
    with pytest.raises(TypeError, match="fps: got"):
        load_video(even, fps=fps)


@pytest.mark.parametrize("by", ["frames", "Time", None, 1, ["time"]], ids=repr)
def test_an_unknown_order_is_refused(even, by):
    with pytest.raises(ValueError, match=r"by: got .*'index' or 'time'"):
        load_video(even, by=by)


@pytest.mark.parametrize("return_times", ["no", None, 2, [True]], ids=repr)
def test_a_wish_for_times_that_is_neither_true_nor_false_is_refused(even, return_times):
    with pytest.raises(TypeError, match=r"return_times: got .* want True or False"):
        load_video(even, return_times=return_times)


def test_options_are_given_by_name(even):
    with pytest.raises(TypeError):
        load_video(even, 4, 2)


def test_arguments_are_judged_before_the_file(tmp_path):
    with pytest.raises(ValueError, match="fps"):
        load_video(tmp_path / "absent.mp4", fps=0)


@pytest.mark.parametrize("kind", ["vp8", "vp9"])
def test_frames_that_are_never_displayed_are_not_counted(tmp_path, kind):
    codec = {"vp8": "libvpx", "vp9": "libvpx-vp9"}[kind]
    options = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "realtime", "cpu-used": "8"}
    path = write_clip(tmp_path / "clip.webm", 40, codec=codec, codec_options=options)
    frames, seconds = load_video(path, 40, return_times=True)
    assert brightness(frames) == shades(40)
    np.testing.assert_allclose(seconds, np.arange(40) / 10, atol=1e-3)


def test_a_clip_is_decoded_once(even, monkeypatch):
    from slowfast_model import video

    runs = []
    decode = video.decode
    monkeypatch.setattr(video, "decode", lambda *args: runs.append(1) or decode(*args))
    load_video(even, 8, fps=2, by="time")
    load_video(even, 8)
    assert len(runs) == 2
