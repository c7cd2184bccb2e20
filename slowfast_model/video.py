"""Decode a video file and sample frames uniformly over it, as the released code does: linspace(0, n - 1, frames)."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def sample_indices(total: int, num_frames: int) -> list[int]:
    """``num_frames`` indices, evenly spaced from the first to the last of ``total``; they repeat if total is less."""
    return np.linspace(0, total - 1, num_frames, dtype=int).tolist()


def load_video(path: str | PathLike, num_frames: int = 64) -> Tensor:
    """uint8 frames [num_frames, height, width, 3] (RGB), sampled uniformly over the whole clip.

    The file is decoded in order, once: seeking is not exact in every container. Needs PyAV (``pip install av``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a video, no frames, truncated, or a frame that cannot be decoded; or ``num_frames`` < 1.
        ImportError: PyAV is not installed.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames: got {num_frames}, want >= 1")
    if not Path(path).exists():
        raise FileNotFoundError(f"path: no such video file: {fspath(path)}")
    total = _count_frames(path)
    frames, decoded = _decode(path, sample_indices(total, num_frames))
    if decoded != total:  # packets are not frames in every codec: sample again over what the decoder gives
        if not decoded:
            raise ValueError(f"path: got {fspath(path)} with no decodable frame, want a video")
        total = decoded
        frames, decoded = _decode(path, sample_indices(total, num_frames))
    return torch.from_numpy(np.stack([frames[i] for i in sample_indices(total, num_frames)]))


def _av():
    try:
        import av
    except ImportError as error:
        raise ImportError("load_video needs PyAV: pip install av") from error
    return av


def _open(path: str | PathLike):
    av = _av()
    try:
        container = av.open(fspath(path))
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(
            f"path: got {fspath(path)}, which is no readable video ({error}); is the file truncated?"
        ) from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"path: got {fspath(path)}, which has no video stream")
    return container


def _count_frames(path: str | PathLike) -> int:
    """Video packets of the file, read without decoding; if its header promises more, the end is missing."""
    packets = 0
    with _open(path) as container:
        stream = container.streams.video[0]
        promised = stream.frames
        try:
            for packet in container.demux(stream):
                packets += packet.size > 0
        except _av().error.FFmpegError as error:
            raise ValueError(f"path: got {fspath(path)}, unreadable after {packets} frames ({error})") from error
    if packets < promised:
        raise ValueError(
            f"path: got {fspath(path)} with {packets} of {promised} frames, want the whole file (truncated?)"
        )
    if not packets:
        raise ValueError(f"path: got {fspath(path)} with no video frames")
    return packets


def _decode(path: str | PathLike, wanted: list[int]) -> tuple[dict[int, np.ndarray], int]:
    """The wanted frames by index, and how many frames there were in all."""
    keep, frames, count = set(wanted), {}, 0
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        try:
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise ValueError(
                        f"path: got {fspath(path)} with a damaged frame {count}, want the whole file (truncated?)"
                    )
                if count in keep:
                    frames[count] = frame.to_ndarray(format="rgb24")
                count += 1
        except _av().error.FFmpegError as error:
            raise ValueError(f"path: got {fspath(path)}, whose frame {count} cannot be decoded ({error})") from error
    return frames, count
