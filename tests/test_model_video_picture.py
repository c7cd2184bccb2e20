"""What load_video shows: the main track, upright, in RGB whatever its pixels are, and one size for the whole clip."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from video_clips import av, brightness, gray, set_matrix, shades, write_clip

from slowfast_model import load_video

Disposition = av.stream.Disposition


def corner(number, width, height):
    """Black, with a bright band on the left and a gray one on top."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 4] = 120
    picture[:, : width // 4] = 250
    return picture


def ramp(number, width, height):
    """Red grows to the right, green downwards: a shifted row or a swapped channel shows."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 255, width, dtype=np.uint8)
    picture[..., 1] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
    picture[..., 2] = 128
    return picture


def write_tracks(path, *tracks, first=()):
    """Video tracks (frames, rate, size, disposition), each of its own brightness: frame i of track k is gray(3 k)."""
    with av.open(str(path), "w") as container:
        streams = []
        for _, rate, size, disposition in tracks:
            stream = container.add_stream("mpeg4", rate=rate)
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
            if disposition:
                stream.disposition = disposition.value
            streams.append(stream)
        for shade, (stream, (num_frames, rate, size, _)) in enumerate(zip(streams, tracks, strict=True)):
            for i in range(num_frames):
                frame = av.VideoFrame.from_ndarray(gray(3 * shade, size, size), format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, rate)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    return path


MATRICES = [
    (1, 0, 0, 1),
    (0, 1, -1, 0),
    (-1, 0, 0, -1),
    (0, -1, 1, 0),
    (-1, 0, 0, 1),
    (1, 0, 0, -1),
    (0, 1, 1, 0),
    (0, -1, -1, 0),
]


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_turned_and_mirrored_pictures_are_upright(tmp_path, matrix):
    path = write_clip(tmp_path / "clip.mp4", 4, (96, 64), codec="libx264", picture=corner)
    stored = load_video(path, 2)
    shown = load_video(set_matrix(path, *matrix), 2)
    a, b, c, d = matrix
    expected = torch.empty(2, *((96, 64) if b else (64, 96)), 3, dtype=torch.uint8)
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(96), indexing="ij")
    across, down = a * columns + c * rows, b * columns + d * rows
    expected[:, down - down.min(), across - across.min()] = stored
    assert torch.equal(shown, expected)


def test_the_sizes_of_a_turned_clip_are_those_of_the_upright_picture(tmp_path):
    path = set_matrix(write_clip(tmp_path / "phone.mov", 3, (96, 64), picture=corner), 0, 1, -1, 0)
    frames = load_video(path, 3)
    assert frames.shape == (3, 96, 64, 3)
    assert frames.is_contiguous()
    assert frames[0, :10].float().mean() > 200  # the band at the stored left is on top
    assert frames[0, 30:, 40:].float().mean() < 150


def test_an_empty_display_matrix_changes_nothing(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 2, (96, 64), picture=corner)
    stored = load_video(path, 2)
    assert torch.equal(load_video(set_matrix(path, 0, 0, 0, 0), 2), stored)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_a_sparse_preview_before_the_video_is_not_taken(tmp_path, suffix):
    path = write_tracks(tmp_path / f"clip{suffix}", (3, 1, 16, None), (30, 10, 64, None))
    assert brightness(load_video(path, 4)) == [3, 3, 3, 3]


@pytest.mark.parametrize("suffix", [".mkv", ".ts"])
def test_a_small_preview_before_the_video_is_not_taken(tmp_path, suffix):
    path = write_tracks(tmp_path / f"clip{suffix}", (20, 10, 16, None), (20, 10, 64, None))
    assert load_video(path, 4).shape == (4, 64, 64, 3)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_secondary_track_is_not_taken(tmp_path, suffix):
    path = write_tracks(tmp_path / f"clip{suffix}", (20, 10, 64, Disposition.default), (20, 10, 96, None))
    assert load_video(path, 4).shape == (4, 64, 64, 3)


def test_a_still_beside_the_video_is_not_taken(tmp_path):
    path = write_tracks(tmp_path / "clip.mkv", (1, 10, 128, None), (20, 10, 64, None))
    assert brightness(load_video(path, 4)) == [3, 3, 3, 3]


@pytest.fixture
def cover(tmp_path):
    path = write_clip(tmp_path / "cover.png", 1, codec="png", pixels="rgb24", live_format="image2pipe")
    return path.read_bytes()


def flac_with_cover(path, cover):
    """A FLAC file whose metadata hold a picture (block 6), written by hand in front of the muxer's other blocks."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    text = [len(b"image/png").to_bytes(4, "big"), b"image/png", bytes(4)]
    numbers = [(64).to_bytes(4, "big"), (64).to_bytes(4, "big"), (24).to_bytes(4, "big"), bytes(4)]
    body = b"".join([(3).to_bytes(4, "big"), *text, *numbers, len(cover).to_bytes(4, "big"), cover])
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[5:8], "big")  # of the first block
    path.write_bytes(data[:end] + b"\x06" + len(body).to_bytes(3, "big") + body + data[end:])
    return path


def test_the_cover_of_a_song_is_no_video(tmp_path, cover):
    path = flac_with_cover(tmp_path / "song.flac", cover)
    with av.open(str(path)) as container:
        assert container.streams.video[0].disposition & Disposition.attached_pic
    with pytest.raises(ValueError, match=r"song.flac.*attached picture"):
        load_video(path, 4)


def test_a_cover_beside_a_video_is_not_taken(tmp_path, cover):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        picture, video = container.add_stream("png", rate=1), container.add_stream("mpeg4", rate=10)
        picture.width = picture.height = 256
        picture.pix_fmt, picture.disposition = "rgb24", Disposition.attached_pic.value
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        container.mux(picture.encode(av.VideoFrame.from_ndarray(gray(13, 256, 256), format="rgb24")))
        for i in range(10):
            container.mux(video.encode(av.VideoFrame.from_ndarray(gray(i, 64, 64), format="rgb24")))
        container.mux(video.encode())
    with av.open(str(path)) as container:
        assert any(stream.disposition & Disposition.attached_pic for stream in container.streams.video)
    assert brightness(load_video(path, 10)) == shades(10)


@pytest.mark.parametrize("num_frames", [1, 4, 40])
def test_a_picture_size_that_changes_is_named_with_its_frame(tmp_path, num_frames):
    first = write_clip(tmp_path / "first.ts", 20, codec="libx264").read_bytes()
    second = write_clip(tmp_path / "second.ts", 20, (128, 96), codec="libx264").read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(first + second)
    with pytest.raises(ValueError, match=r"joined\.ts.*size changes from 64 x 64 to 128 x 96 at frame 20\b"):
        load_video(path, num_frames)


@pytest.mark.parametrize("size", [(63, 47), (1, 1), (5, 9), (65, 33), (17, 64)], ids=str)
@pytest.mark.parametrize("pixels", ["yuv420p", "yuv422p10le", "yuva420p", "gbrp10le", "bgra", "gray", "yuv444p16le"])
def test_any_width_and_pixel_format_becomes_rgb(tmp_path, pixels, size):
    frames = load_video(write_clip(tmp_path / "clip.mkv", 2, size, codec="ffv1", pixels=pixels, picture=ramp), 2)
    assert frames.shape == (2, size[1], size[0], 3)
    expected = ramp(0, *size).astype(float)
    if pixels == "gray":
        expected = np.repeat(expected @ [[0.299], [0.587], [0.114]], 3, axis=2)
    if min(size) > 5:
        assert np.abs(frames[0].numpy() - expected).mean() < 12  # half of a chroma sample's step, at most


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_high_dynamic_range_becomes_rgb(tmp_path, codec):
    options = {f"{codec[3:]}-params": "transfer=smpte2084:colorprim=bt2020:colormatrix=bt2020nc"}
    path = write_clip(tmp_path / "clip.mkv", 4, codec=codec, pixels="yuv420p10le", codec_options=options)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.color_trc == 16  # PQ
    frames = load_video(path, 4)
    assert frames.shape == (4, 64, 64, 3)
    assert frames.float().mean((1, 2, 3)).diff().min() > 5


@pytest.mark.parametrize("pixels", ["rgb8", "pal8", "gray"])
def test_palettes_become_rgb(tmp_path, pixels):
    path = write_clip(tmp_path / "clip.gif", 5, codec="gif", pixels="rgb8" if pixels == "pal8" else pixels)
    assert load_video(path, 5).shape == (5, 64, 64, 3)


def test_an_animated_webp_is_decoded_or_called_so(tmp_path):
    path = write_clip(tmp_path / "clip.webp", 5, codec="libwebp_anim", pixels="bgra")
    with av.open(str(path)) as container:
        decodes = container.format.name != "webp_pipe"  # FFmpeg's reader of still pictures
    if decodes:
        assert brightness(load_video(path, 5)) == shades(5)
    else:
        with pytest.raises(ValueError, match="animated WebP"):
            load_video(path, 5)


PICTURES = {
    ".png": ("png", "rgb24"),
    ".jpg": ("mjpeg", "yuvj420p"),
    ".bmp": ("bmp", "bgr24"),
    ".tiff": ("tiff", "rgb24"),
}


@pytest.mark.parametrize("suffix", PICTURES)
def test_a_picture_file_is_a_clip_of_one_frame(tmp_path, suffix):
    codec, pixels = PICTURES[suffix]
    path = write_clip(tmp_path / f"picture{suffix}", 1, codec=codec, pixels=pixels, live_format="image2pipe")
    assert brightness(load_video(path, 2)) == [0, 0]
