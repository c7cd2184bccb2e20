"""Decode a video file and sample its frames: evenly, as the released demo, or at a rate, as the released evaluation.

What a frame is, and whether a file is whole, is decided in ``_container``; here are the arguments, which frames are
taken, and the times that they are shown at.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Rational
from os import PathLike

import numpy as np
import torch
from torch import Tensor

from slowfast_kernels.numbers import as_bool, as_float, as_int

from ._container import Clock, decode, file_name, scan

_ORDERS = ("index", "time")


def sample_indices(total: int, num_frames: int) -> list[int]:
    """``num_frames`` indices, evenly spaced from the first to the last of ``total``; they repeat if total is less."""
    return np.linspace(0, total - 1, num_frames, dtype=int).tolist()


def load_video(
    path: str | bytes | PathLike,
    num_frames: int = 64,
    *,
    fps: float | None = None,
    by: str = "index",
    return_times: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """uint8 frames [T, height, width, 3] (RGB) of the best video track, upright, sampled over the whole clip.

    Frames are those that decode and are displayed, in display order: no hidden ones, none that an edit list cuts off.
    Without ``fps``, T is ``num_frames``, and frames repeat if the clip has fewer:

    - ``by="index"``: frames ``numpy.linspace(0, n - 1, num_frames, dtype=int)`` of n, as the released demo.
    - ``by="time"``: the frame on screen at each of ``num_frames`` times, evenly spaced from the first frame's time to
      the last one's. The two differ where the frame rate varies.

    With ``fps``, T is at most ``num_frames``:

    - ``by="index"``: every ``max(1, round(rate / fps))``-th frame from the first on, ``rate`` being the clip's mean
      frame rate: the header's, or the measured one where these are more than 1% apart.
    - ``by="time"``: the frame on screen at the first frame's time + k / fps, k = 0, 1, ... up to the last frame's time.
    - If these are m > num_frames, then ``round((i + 1) * m / num_frames - 1)`` of them for i = 0 ... num_frames - 1,
      as the released evaluation (``fps=2``): the last is always taken, the first is not.

    ``path`` is the name of a local file whatever it looks like; nothing that it refers to is opened. The display
    matrix (rotation, mirror) is applied, the pixel aspect ratio is not. A file is refused where its structure, its
    damaged packets or frames, a read error or (for containers that store one) its duration say that a part is
    missing; what nothing tells, such as a raw stream cut between two frames, is taken as it is. Damage inside a
    frame is found as far as its decoder reports it: those of HEVC, VP9 and AV1 report little. A stream that begins
    between key frames is taken from its first key frame on.

    Cost: the file is read twice and decoded once, and once more if its packets foretell other frames than are
    displayed. Threads share a frame, not several frames, so that damage is found in every run. Memory: the frames
    taken, twice.

    Args:
        path: name of a video file.
        num_frames: how many frames to take, >= 1; with ``fps``, at most.
        fps: frames per second to take, > 0; None samples the whole clip evenly.
        by: "index" or "time".
        return_times: also return when the taken frames are shown.
        progress: called at every decoded frame with the number of frames so far and the number that is expected.

    Returns:
        The frames; with ``return_times``, (frames, seconds float64 [T]): the presentation time of each frame taken on
        the file's own clock, whose zero is where the container's time begins. A first frame is not always at 0. A
        stream without times (raw H.264) counts from 0 at its frame rate; where the clock jumps back (joined
        recordings) it goes on from the frame before.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable video, no video track, no frames, cut short or damaged, or a picture size that
            changes; or ``num_frames``, ``fps`` or ``by`` out of range.
        TypeError: ``path``, ``num_frames``, ``fps``, ``return_times`` or ``progress`` of another type.
        ImportError: PyAV is not installed.
    """
    num_frames = as_int("num_frames", num_frames, 1)
    rate = None if fps is None else _exact_rate(fps)
    if not isinstance(by, str) or by not in _ORDERS:
        raise ValueError(f"by: got {by!r}, want {' or '.join(map(repr, _ORDERS))}")
    return_times = as_bool("return_times", return_times)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: got {type(progress).__name__}, want a function of two numbers or None")
    name = file_name(path)

    found = scan(path, name)
    taken = _select(_timeline(found.clock), num_frames, rate, by)
    decoded = decode(path, name, found, set(taken), progress)
    shown = _timeline(decoded.clock)
    taken = _select(shown, num_frames, rate, by)
    frames = decoded.frames
    if not frames.keys() >= set(taken):  # the codec hides frames, or their times differ from the packets'
        frames = decode(path, name, found, set(taken), progress).frames

    pictures = torch.from_numpy(np.stack([frames[index] for index in taken]))
    if not return_times:
        return pictures
    return pictures, torch.tensor([shown.seconds(index) for index in taken], dtype=torch.float64, device="cpu")


def _exact_rate(fps: float) -> Fraction:
    """``fps`` as the fraction that was meant: 1/10 for 0.1, so that every tenth second falls on its frame."""
    want = "a finite number > 0 or None"
    value = as_float("fps", fps, want)
    if value <= 0:
        raise ValueError(f"fps: got {value}, want {want}")
    if isinstance(fps, Rational):
        return Fraction(fps)
    return Fraction(value).limit_denominator(1_000_000) or Fraction(value)


@dataclass(frozen=True)
class _Timeline:
    """When each frame of a clip is shown: rising stamps in ticks of ``time_base`` seconds, and the mean rate."""

    ticks: Sequence[int]
    time_base: Fraction
    rate: Fraction  # frames per second

    def seconds(self, index: int) -> float:
        return self.ticks[index] * self.time_base.numerator / self.time_base.denominator

    def on_screen(self, tick: Fraction) -> int:
        """The frame shown at a time; stamps in milliseconds (Matroska, FLV) and finer are rounded ones."""
        rounding = Fraction(1, 2) if self.time_base <= Fraction(1, 1000) else 0
        return max(0, bisect_right(self.ticks, tick + rounding) - 1)


def _timeline(clock: Clock) -> _Timeline:
    header = clock.header_rate
    if None in clock.stamps:
        rate = header or Fraction(25)
        return _Timeline(range(len(clock.stamps)), 1 / rate, rate)
    steps = sorted(b - a for a, b in zip(clock.stamps, clock.stamps[1:], strict=False) if b > a)
    step = steps[len(steps) // 2] if steps else clock.last_duration or 1
    ticks, shift = [], 0
    for stamp in clock.stamps:
        if ticks and stamp + shift < ticks[-1]:  # the clock was set back
            shift = ticks[-1] + step - stamp
        ticks.append(stamp + shift)
    measured = len(ticks) / ((ticks[-1] - ticks[0] + (clock.last_duration or step)) * clock.time_base)
    close = header is not None and abs(header - measured) * 100 <= measured
    return _Timeline(ticks, clock.time_base, header if close else measured)


def _select(clip: _Timeline, num_frames: int, fps: Fraction | None, by: str) -> list[int]:
    """Indices of the frames to take, as ``load_video`` describes them."""
    total, ticks = len(clip.ticks), clip.ticks
    if fps is None and by == "index":
        return sample_indices(total, num_frames)
    if fps is None:
        spacing = Fraction(ticks[-1] - ticks[0], max(1, num_frames - 1))
        return [clip.on_screen(ticks[0] + k * spacing) for k in range(num_frames)]
    if by == "index":
        every = max(1, round(clip.rate / fps))
        return [k * every for k in _thinned(-(-total // every), num_frames)]
    spacing = 1 / (fps * clip.time_base)
    return [clip.on_screen(ticks[0] + k * spacing) for k in _thinned((ticks[-1] - ticks[0]) // spacing + 1, num_frames)]


def _thinned(count: int, at_most: int) -> list[int]:
    """All of ``count`` indices, or ``at_most`` of them as the released evaluation takes them."""
    if count <= at_most:
        return list(range(count))
    spacing = count / at_most if count < 2**53 else Fraction(count, at_most)
    return [round((i + 1) * spacing - 1) for i in range(at_most)]
