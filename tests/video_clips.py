"""Small video files for the tests of load_video: written with PyAV, then patched where no muxer writes the odd case."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")

AUDIO_RATE = 8000  # Hz
SHADES = 14  # brightness tells frames apart modulo this


def gray(number: int, width: int, height: int) -> np.ndarray:
    """A picture of brightness 20 + 15 (number mod 14)."""
    return np.full((height, width, 3), 20 + 15 * (number % SHADES), np.uint8)


def noise(number: int, width: int, height: int) -> np.ndarray:
    """A picture that no codec makes small: a cut in the file falls inside of a frame."""
    return np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)


def brightness(frames: torch.Tensor) -> list[int]:
    """The numbers, modulo 14, of ``gray`` pictures."""
    return [round((frame.float().mean().item() - 20) / 15) for frame in frames]


def shades(num_frames: int) -> list[int]:
    return [number % SHADES for number in range(num_frames)]


class _Pipe:
    """A file that cannot seek, as a live recording is written to."""

    def __init__(self):
        self.buffer = io.BytesIO()

    def write(self, data: bytes) -> int:
        return self.buffer.write(data)


def write_clip(
    path: Path,
    num_frames: int,
    size: tuple[int, int] = (64, 64),
    *,
    codec: str = "mpeg4",
    pixels: str = "yuv420p",
    rate: int = 10,
    picture=gray,
    times: list[int] | None = None,
    gop: int = 12,
    codec_options: dict | None = None,
    options: dict | None = None,
    live_format: str | None = None,
    audio_seconds: float = 0,
) -> Path:
    """A clip of ``picture(i, width, height)`` at ``times[i]`` (default i) / rate seconds, with PCM or AAC silence."""
    target = _Pipe() if live_format else str(path)
    with av.open(target, "w", format=live_format, options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=codec_options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.gop_size = gop
        if codec not in ("gif", "ffv1", "apng"):
            stream.bit_rate = 4_000_000
        audio = container.add_stream("aac", rate=AUDIO_RATE, layout="mono") if audio_seconds else None
        container.start_encoding()  # so that a clip of no frames has a header too
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            frame.pts, frame.time_base = times[i] if times else i, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio:
            for k in range(int(audio_seconds * AUDIO_RATE / 1024)):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = AUDIO_RATE, k * 1024, Fraction(1, AUDIO_RATE)
                container.mux(audio.encode(frame))
            container.mux(audio.encode())
    if live_format:
        path.write_bytes(target.buffer.getvalue())
    return path


def keep_bytes(path: Path, kept: int | slice) -> Path:
    """The file, cut to its first bytes (all but so many, if negative) or to a slice of them."""
    data = path.read_bytes()
    path.write_bytes(data[kept] if isinstance(kept, slice) else data[:kept])
    return path


def patch(path: Path, marker: bytes, offset: int, form: str, *values: float) -> Path:
    """Overwrite packed ``values`` at ``offset`` bytes behind the start of the only ``marker``."""
    data = bytearray(path.read_bytes())
    assert data.count(marker) == 1, (marker, data.count(marker))
    struct.pack_into(form, data, data.index(marker) + offset, *values)
    path.write_bytes(data)
    return path


def show_part(path: Path, first: float, seconds: float) -> Path:
    """Give an MP4 an edit list that shows ``seconds`` from ``first`` on: every sample stays in the file."""
    data = path.read_bytes()
    media_scale, movie_scale = (struct.unpack_from(">I", data, data.index(box) + 16)[0] for box in (b"mdhd", b"mvhd"))
    return patch(path, b"elst", 12, ">Ii", round(seconds * movie_scale), round(first * media_scale))


def set_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Give an MP4's track a display matrix of whole numbers."""
    one = 1 << 16
    return patch(path, b"tkhd", 44, ">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
