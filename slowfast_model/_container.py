"""Read one local video file with PyAV: which stream is the video, is the file whole, and its pictures as displayed.

A file is read twice. ``scan`` takes the packets of every stream, undecoded, and judges whether the file is whole: by
its structure, by read errors, by damaged packets and, where the structure tells nothing, by the end of its last
packet against the container's duration. ``decode`` decodes the video from its first key frame on and keeps the wanted
pictures alone.

FFmpeg gets the bytes of the file and no name: to it a name may be an address (``http:``, ``concat:``) or a pattern of
names (``%03d``). Nor may what it reads open anything else (a playlist, a reference to another file).

Frames are decoded with slice threads. Frame threads give pictures out before their errors are known, so whether a
damaged picture is marked depends on timing, and errors at the end of a file are lost.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ._file_end import ends_as_stated

_NO_VIDEO = (
    (b"#EXTM3U", "a playlist of other files, want the video file itself"),
    (b"ffconcat version", "a list of other files, want the video file itself"),
    (b"version https://git-lfs", "a Git LFS pointer, want the file itself: git lfs pull"),
)
_STORED_DURATION = {"mp4", "matroska", "flv", "asf", "mxf", "ivf"}  # elsewhere FFmpeg guesses it from the data
_BUFFER = 1 << 18


@dataclass(frozen=True)
class Clock:
    """Presentation stamps of frames in display order, in ticks of ``time_base`` seconds; None for a frame without."""

    stamps: list[int | None]
    time_base: Fraction
    last_duration: int  # of the last frame, 0 if unknown
    header_rate: Fraction | None  # frames per second, as the file's header has it


@dataclass(frozen=True)
class Scan:
    """What the packets of a file say about the frames that they hold."""

    stream: int  # index of the video stream
    lead_in: int  # packets before the first key frame, which nothing can decode
    first_key: int | None  # presentation stamp of the first key frame
    damaged: frozenset[int]  # numbers of the packets that lack data
    clock: Clock  # the frames to expect: a codec may hide some


class _Packet(NamedTuple):
    stamp: int | None
    duration: int
    is_key: bool
    is_shown: bool
    is_corrupt: bool
    position: int | None


class _Source:
    """The bytes of a file, without its name; remembers a read error, which FFmpeg may take for the end of the file."""

    def __init__(self, file: BinaryIO):
        self._file, self.error = file, None
        self.seek, self.tell = file.seek, file.tell

    def read(self, length: int) -> bytes:
        try:
            return self._file.read(length)
        except OSError as error:
            self.error = error
            raise


def refusal(name: str, what: str) -> ValueError:
    return ValueError(f"path: got {name}, {what}")


def _av():
    try:
        import av
    except ImportError as error:
        raise ImportError("load_video needs PyAV: pip install av") from error
    return av


def _cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def file_name(path: str | bytes | os.PathLike) -> str:
    """The name of an existing regular file, for messages."""
    try:
        name = os.fsdecode(path)
    except TypeError:
        raise TypeError(f"path: got {type(path).__name__}, want a file name (str, bytes or os.PathLike)") from None
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        hint = " (a name is that of a local file: download it first)" if "://" in name else ""
        raise FileNotFoundError(f"path: no such video file: {name}{hint}") from None
    except (OSError, ValueError) as error:
        raise refusal(name, f"which cannot be read ({_cause(error)})") from error
    if stat.S_ISDIR(mode):
        raise refusal(name, "a directory, want a video file")
    if not stat.S_ISREG(mode):
        raise refusal(name, "a pipe, socket or device, want a video file")
    return name


@contextmanager
def _opened(path: str | bytes | os.PathLike, name: str) -> Iterator[tuple[Any, _Source]]:
    av = _av()
    # Names that are no UTF-8: PyAV 19 replaces them by itself, and has no such option.
    options = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below, with the container
        head = file.read(32)
        file.seek(0)
    except OSError as error:
        raise refusal(name, f"which cannot be read ({_cause(error)})") from error
    with file:
        if not head:
            raise refusal(name, "an empty file, want a video")
        for signature, what in _NO_VIDEO:
            if head.startswith(signature):
                raise refusal(name, what)
        source = _Source(file)
        try:
            container = av.open(
                source,
                container_options={"protocol_whitelist": "none"},  # ``options`` makes PyAV 15 and 16 crash on FLV
                buffer_size=_BUFFER,
                **options,
            )
        except (av.error.FFmpegError, OSError, ValueError) as error:
            what = f"which is no readable video ({_cause(error)}); is the file truncated?"
            raise refusal(name, what) from error
        with container:
            yield container, source


def _candidates(container: Any, name: str) -> list[Any]:
    videos = list(container.streams.video)
    if not videos:
        raise refusal(name, "which has no video stream")
    attached = _av().stream.Disposition.attached_pic
    videos = [stream for stream in videos if not stream.disposition & attached]
    if not videos:
        raise refusal(name, "whose only picture is an attached picture (a cover), want a video stream")
    decodable = [stream for stream in videos if stream.codec_context is not None]
    if not decodable:
        raise refusal(name, "whose video stream is of a codec that this FFmpeg does not decode")
    return decodable


def _main_stream(streams: list[Any], packets: dict[int, list[_Packet]]) -> Any:
    """As FFmpeg chooses (the default track, then the better one), but never a sparse track beside a full one."""
    kind = _av().stream.Disposition
    aside = kind.timed_thumbnails | kind.dependent | kind.visual_impaired | kind.hearing_impaired
    most = max(len(packets[stream.index]) for stream in streams)

    def rank(stream: Any) -> tuple:
        count = len(packets[stream.index])
        area = stream.codec_context.width * stream.codec_context.height
        return not stream.disposition & aside, 2 * count >= most, bool(stream.disposition & kind.default), area, count

    return max(streams, key=rank)


def scan(path: str | bytes | os.PathLike, name: str) -> Scan:
    """The frames to expect of a whole file.

    Raises:
        ValueError: there is no video in the file, or it is cut short or cannot be read to its end.
    """
    with _opened(path, name) as (container, source):
        streams = _candidates(container, name)
        packets: dict[int, list[_Packet]] = {stream.index: [] for stream in container.streams}
        end = Fraction(0)
        try:
            for packet in container.demux():
                if not packet.size:
                    continue
                stamp = packet.dts if packet.pts is None else packet.pts
                duration = packet.duration or 0
                if stamp is not None:
                    end = max(end, (stamp + duration) * packet.time_base)
                if packet.stream.type == "video":
                    flags = packet.is_keyframe, not packet.is_discard, packet.is_corrupt
                    packets[packet.stream_index].append(_Packet(stamp, duration, *flags, packet.pos))
        except (_av().error.FFmpegError, OSError) as error:
            source.error = source.error or error
        stream = _main_stream(streams, packets)
        found = packets[stream.index]
        if source.error is not None:
            raise refusal(name, f"unreadable after {len(found)} frames ({_cause(source.error)})")
        with open(path, "rb") as file:
            whole = ends_as_stated(container.format.name, file, os.fstat(file.fileno()).st_size)
            damaged = _damaged(found, file)
        if whole is False:
            raise refusal(name, f"cut short after {len(found)} frames, want the whole file (truncated?)")
        clock = _expected_clock(found, stream)
        if not clock.stamps:
            raise refusal(name, "with no video frames")
        if whole is None and container.duration and _STORED_DURATION & set(container.format.name.split(",")):
            _check_end(end, Fraction(container.duration, 1_000_000), clock, name)
        keys = [number for number, packet in enumerate(found) if packet.is_key]
        lead_in = keys[0] if keys else 0
        return Scan(stream.index, lead_in, found[lead_in].stamp, damaged, clock)


def _expected_clock(packets: list[_Packet], stream: Any) -> Clock:
    shown = [packet for packet in packets if packet.is_shown]
    stamps = [packet.stamp for packet in shown]
    if None not in stamps:
        stamps.sort()
    rate = stream.average_rate or stream.guessed_rate
    last = shown[-1].duration if shown else 0
    return Clock(stamps, stream.time_base, last, Fraction(rate) if rate else None)


def _check_end(end: Fraction, duration: Fraction, clock: Clock, name: str) -> None:
    """Refuse a file whose streams, all of them, end before the duration that its header holds."""
    stamps = [stamp for stamp in clock.stamps if stamp is not None]
    period = 1 / clock.header_rate if clock.header_rate else Fraction(0)
    if len(stamps) > 1:
        period = max(period, (stamps[-1] - stamps[0]) * clock.time_base / (len(stamps) - 1))
    if duration - end > max(Fraction(3, 2) * period, Fraction(1, 20)):  # how long the last frame lasts may be unknown
        what = f"which ends at {float(end):.2f} s of {float(duration):.2f} s, want the whole file (truncated?)"
        raise refusal(name, what)


def _damaged(packets: list[_Packet], file: BinaryIO) -> frozenset[int]:
    """The packets that lack data. Where transport streams were joined nothing is lost, though their counters jump."""

    def begins_stream(packet: _Packet) -> bool:
        if not packet.is_key or packet.position is None:
            return False
        file.seek(packet.position)
        head = file.read(4)
        return len(head) == 4 and head[0] == 0x47 and head[3] & 0x0F == 0  # a new multiplexer counts from 0

    return frozenset(
        number
        for number, packet in enumerate(packets)
        if packet.is_corrupt and not any(begins_stream(later) for later in packets[number + 1 : number + 3])
    )


@dataclass(frozen=True)
class Decoded:
    """The kept frames, uint8 [height, width, 3] by their number, and the clock of all frames."""

    frames: dict[int, np.ndarray]
    clock: Clock


def decode(
    path: str | bytes | os.PathLike,
    name: str,
    scan: Scan,
    wanted: set[int],
    progress: Callable[[int, int], object] | None = None,
) -> Decoded:
    """Decode every frame and keep the wanted ones; ``progress`` hears of each (how many so far, how many expected).

    Raises:
        ValueError: a frame is damaged or cannot be decoded, or the picture size changes.
    """
    av = _av()
    frames: dict[int, np.ndarray] = {}
    stamps: list[int | None] = []
    size = shape = None
    last_duration = 0
    with _opened(path, name) as (container, source):
        stream = container.streams[scan.stream]
        stream.thread_type = "SLICE"
        for frame in _displayed(container, source, stream, scan, stamps, name):
            if size not in (None, (frame.width, frame.height)):
                raise _size_change(name, len(stamps), size, (frame.width, frame.height))
            size = frame.width, frame.height
            if len(stamps) in wanted:
                try:
                    picture = np.ascontiguousarray(_upright(frame.to_ndarray(format="rgb24"), frame))
                except (av.error.FFmpegError, OSError, ValueError) as error:
                    what = f"whose frame {len(stamps)} ({frame.format.name}) has no RGB form ({_cause(error)})"
                    raise refusal(name, what) from error
                if shape not in (None, picture.shape):
                    raise _size_change(name, len(stamps), shape[1::-1], picture.shape[1::-1])
                shape = picture.shape
                frames[len(stamps)] = picture
            stamps.append(frame.dts if frame.pts is None else frame.pts)
            last_duration = frame.duration or 0
            if progress is not None:
                progress(len(stamps), len(scan.clock.stamps))
    if not stamps:
        raise refusal(name, "with no decodable frame, want a video")
    return Decoded(frames, Clock(stamps, scan.clock.time_base, last_duration, scan.clock.header_rate))


def _size_change(name: str, number: int, old: tuple[int, int], new: tuple[int, int]) -> ValueError:
    sizes = f"{old[0]} x {old[1]} to {new[0]} x {new[1]}"
    return refusal(
        name, f"whose picture size changes from {sizes} at frame {number}, want one size: split the file there"
    )


def _displayed(
    container: Any, source: _Source, stream: Any, scan: Scan, done: list[int | None], name: str
) -> Iterator[Any]:
    """The frames in display order, each undamaged; ``done`` has one entry for every frame taken so far."""
    av = _av()
    packets = _numbered(container, stream)
    while True:
        try:
            number, packet = next(packets)
        except StopIteration:
            break
        except (av.error.FFmpegError, OSError) as error:
            raise refusal(name, f"unreadable after {len(done)} frames ({_cause(error)})") from error
        if number < scan.lead_in:
            continue
        if number in scan.damaged:
            what = f"with a damaged packet after frame {len(done)}, want the whole file (truncated?)"
            raise refusal(name, what)
        packet.is_corrupt = False
        try:
            decoded = stream.decode(packet)
        except (av.error.FFmpegError, OSError) as error:
            if _holds_picture(bytes(packet), stream.codec_context):
                what = f"whose frame {len(done)} cannot be decoded ({_cause(error)})"
                if container.format.name == "webp_pipe":
                    what += "; an animated WebP is not: convert it to GIF, PNG or MP4"
                raise refusal(name, what) from error
            continue
        for frame in decoded:
            if frame.is_corrupt:
                if None not in (frame.pts, scan.first_key) and frame.pts < scan.first_key:
                    continue  # it leans on frames before the file's first key frame
                what = f"with a damaged frame {len(done)}, want the whole file (truncated?)"
                raise refusal(name, what)
            yield frame
    if source.error is not None:
        raise refusal(name, f"unreadable after {len(done)} frames ({_cause(source.error)})")


def _numbered(container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
    """The stream's packets by number, then PyAV's empty one, which asks the decoder for the frames it still holds.

    Other empty packets (a repeated picture in AVI) are left out: a decoder would take the first for the end.
    """
    number, last = 0, None
    for last in container.demux(stream):
        if last.size:
            yield number, last
            number += 1
    if last is not None and not last.size:
        yield number, last


def _holds_picture(data: bytes, codec: Any) -> bool:
    """False for H.264 and HEVC packets of parameter sets and messages alone, for which the decoders raise errors."""
    if codec.name not in ("h264", "hevc"):
        return True
    extra = codec.extradata or b""
    length_bytes = {"h264": 4, "hevc": 21}[codec.name]
    units = []
    if extra[:1] == b"\x01" and len(extra) > length_bytes:
        width, position = (extra[length_bytes] & 3) + 1, 0
        while position + width < len(data):
            units.append(data[position + width])
            position += width + int.from_bytes(data[position : position + width], "big")
    else:
        units = [part[0] for part in data.split(b"\0\0\1")[1:] if part]
    if codec.name == "h264":
        return any(1 <= unit & 31 <= 5 for unit in units)
    return any(unit >> 1 & 63 < 32 for unit in units)


def _upright(picture: np.ndarray, frame: Any) -> np.ndarray:
    """Turn and mirror a picture as the file's display matrix says, to the nearest quarter turn.

    The matrix [[a, b, u], [c, d, v], [x, y, w]] takes the stored column p and row q to the displayed column a p + c q
    + x and row b p + d q + y.
    """
    try:
        matrix = frame.side_data.get(_av().sidedata.sidedata.Type.DISPLAYMATRIX)
    except ValueError:  # the frame has side data of a kind that this PyAV does not know: it gives the angle alone
        return np.rot90(picture, round(frame.rotation / 90) % 4)
    if matrix is None:
        return picture
    a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32, count=5).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        picture, a, d = picture.swapaxes(0, 1), c, b
    if a < 0:
        picture = picture[:, ::-1]
    if d < 0:
        picture = picture[::-1]
    return picture
