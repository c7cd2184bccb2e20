"""Does a file end where its own structure says it ends?

FFmpeg reads what is there and is silent about most of what is missing, so a recording cut by a broken download looks
like a shorter one. Most containers state the sizes of their parts: one walk over these headers, without reading what
they hold, finds a part that goes on past the end of the file. What no size tells (a stream cut between two of its
packets) is left to the container's duration.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import BinaryIO

_TAIL = 1 << 20  # bytes searched for the last marker of a JPEG picture


def ends_as_stated(format_name: str, file: BinaryIO, size: int) -> bool | None:
    """True: the file holds all that it says it holds. False: it is cut short. None: its structure does not tell.

    ``format_name`` is FFmpeg's name of the container, ``size`` the file's length in bytes.
    """
    for name, walk in _WALKS.items():
        if name in format_name.split(","):
            return walk(file, size)
    return None


def _at(file: BinaryIO, position: int, length: int) -> bytes:
    file.seek(position)
    return file.read(length)


_MP4_BOXES = frozenset(
    b"ftyp styp moov moof mdat mfra sidx ssix free skip wide uuid meta udta pdin prft emsg pnot PICT".split()
)


def _mp4(file: BinaryIO, size: int) -> bool | None:
    """Boxes: 4 bytes of length, 4 of type; a length of 1 stands before 8 bytes of length, 0 is "to the end"."""
    position, fragmented = 0, False
    while position < size:
        head = _at(file, position, 16)
        if not head.strip(b"\0"):
            break  # padding
        if len(head) < 8:
            return head[0] != 0  # a length below 16 MB begins with 0; anything else was appended
        length, kind = struct.unpack_from(">I4s", head)
        if kind not in _MP4_BOXES:
            break  # something else was appended
        fragmented |= kind == b"moof"
        if length == 0:
            break
        if length == 1:
            if len(head) < 16:
                return False
            length = struct.unpack_from(">Q", head, 8)[0]
        if length < 8:
            break
        position += length
        if position > size:
            return False
    return None if fragmented else True  # fragments follow each other: nothing says how many there are


_EBML_TOP = (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67")  # the ids of the EBML header and of a Segment


def _matroska(file: BinaryIO, size: int) -> bool | None:
    """EBML elements; a Segment or Cluster of unknown length (a live recording) is walked element by element."""
    position, stated = 0, True
    while position < size:
        head = _at(file, position, 12)
        id_bytes = 9 - head[0].bit_length()
        if id_bytes > 4:
            break  # no element: something else was appended
        if len(head) <= id_bytes:
            return stated
        length_bytes = 9 - head[id_bytes].bit_length()
        if length_bytes > 8:
            break
        field = head[id_bytes : id_bytes + length_bytes]
        if len(field) < length_bytes:
            return stated
        unknown = (1 << 7 * length_bytes) - 1
        length = int.from_bytes(field, "big") & unknown
        position += id_bytes + length_bytes
        if length == unknown:
            stated = False
            continue
        position += length
        if position > size:
            if stated and head[:id_bytes] not in _EBML_TOP:
                break
            return False
    return True if stated else None


_RIFF_CHUNKS = frozenset(b"LIST JUNK idx1 VP8L VP8X ALPH ANIM ANMF ICCP EXIF".split()) | {b"VP8 ", b"XMP "}


def _riff(file: BinaryIO, size: int) -> bool | None:
    """Chunks: 4 bytes of type, 4 of length, padded to even. AVI past 1 GB is a row of RIFF chunks, walked inside."""
    position = 0
    while position < size:
        head = _at(file, position, 8)
        if len(head) < 8:
            return not any(known.startswith(head[:4]) for known in (b"RIFF", *_RIFF_CHUNKS))
        kind, length = struct.unpack("<4sI", head)
        if kind == b"RIFF":
            position += 12
            continue
        if kind not in _RIFF_CHUNKS:
            break  # something else was appended
        if kind == b"LIST" and length in (0, 0xFFFFFFFF):
            return None  # never finished: the lengths were not filled in
        if position + 8 + length > size:
            return False
        position += 8 + length + length % 2
    return True


def _flv(file: BinaryIO, size: int) -> bool | None:
    """Tags of audio (8), video (9) and data (18), each followed by its length in 4 bytes."""
    position = struct.unpack(">I", _at(file, 5, 4))[0] + 4
    while position < size:
        head = _at(file, position, 11)
        if head[0] & 0x1F not in (8, 9, 18):
            break
        position += 11 + int.from_bytes(head[1:4], "big") + 4
        if len(head) < 11 or position > size:
            return False
    return None  # complete tags, but nothing says how many


def _mpegts(file: BinaryIO, size: int) -> bool | None:
    """Packets of one length (188 bytes, 4 more with time stamps, 16 more with check bytes), each beginning by 0x47."""
    head = _at(file, 0, 8 * 204)
    for packet in (188, 192, 204):
        for first in range(packet):
            if len(head) > first + 4 * packet and set(head[first::packet][:5]) == {0x47}:
                rest = (size - first) % packet  # 188 where time stamps come in front: nothing follows the last packet
                stub = 0 < rest < 188 and _at(file, size - rest, 1) == b"\x47"
                return False if stub else None
    return None


def _ogg(file: BinaryIO, size: int) -> bool | None:
    """Pages: a header of 27 bytes, a table of segment lengths, the segments."""
    position = 0
    while position < size:
        head = _at(file, position, 27 + 255)
        if not b"OggS".startswith(head[:4]):
            break
        if len(head) < 27 or len(head) < 27 + head[26]:
            return False
        position += 27 + head[26] + sum(head[27 : 27 + head[26]])
        if position > size:
            return False
    return None


def _gif(file: BinaryIO, size: int) -> bool | None:
    """A header with a colour table, then extensions and pictures as rows of sub-blocks, then the trailer 0x3B."""

    def table(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    head = _at(file, 0, 13)
    if len(head) < 13:
        return False
    position = 13 + table(head[10])
    while position < size:
        head = _at(file, position, 10)
        if head[0] == 0x3B:
            return True
        if head[0] == 0x21:
            position += 2
        elif head[0] == 0x2C and len(head) == 10:
            position += 10 + table(head[9]) + 1
        elif head[0] == 0x2C:
            return False
        else:
            return None
        while True:
            block = _at(file, position, 1)
            if not block:
                return False
            position += 1 + block[0]
            if block == b"\0":
                break
    return False  # the trailer is missing


def _asf(file: BinaryIO, size: int) -> bool | None:
    """The file properties object holds the file's length, which a broadcast (flag 1) does not know."""
    head = _at(file, 0, 1 << 16)
    start = head.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    if start < 0 or len(head) < start + 92:
        return None
    (stated,), (flags,) = struct.unpack_from("<Q", head, start + 40), struct.unpack_from("<I", head, start + 88)
    if flags & 1 or not stated:
        return None
    return size >= stated


def _y4m(file: BinaryIO, size: int) -> bool | None:
    """A header line with the width, height and format, then frames of one length, each after a line ``FRAME``."""
    header, newline, rest = _at(file, 0, 4096).partition(b"\n")
    tags = {tag[:1]: tag[1:].decode("ascii", "replace") for tag in header.split()[1:]}
    chroma, _, depth = tags.get(b"C", "420").partition("p")
    across, down = {"420": (2, 2), "422": (2, 1), "444": (1, 1), "411": (4, 1)}.get(chroma[:3], (0, 0))
    if not rest.startswith(b"FRAME\n") or not across or "alpha" in chroma:
        return None
    width, height = int(tags[b"W"]), int(tags[b"H"])
    samples = width * height + 2 * -(-width // across) * -(-height // down)
    frame = len(b"FRAME\n") + samples * (2 if depth.isdigit() else 1)
    return (size - len(header + newline)) % frame == 0


def _png(file: BinaryIO, size: int) -> bool | None:
    """The last chunk of a PNG, animated or not, is IEND."""
    return b"IEND" in _at(file, max(0, size - _TAIL), _TAIL)


def _jpeg(file: BinaryIO, size: int) -> bool | None:
    """The last picture's start marker is followed by an end marker: compressed data cannot contain one."""
    tail = _at(file, max(0, size - _TAIL), _TAIL)
    start, end = tail.rfind(b"\xff\xd8\xff"), tail.rfind(b"\xff\xd9")
    return None if start == end else end > start


_WALKS: dict[str, Callable[[BinaryIO, int], bool | None]] = {
    "mp4": _mp4,
    "matroska": _matroska,
    "avi": _riff,
    "webp_pipe": _riff,
    "flv": _flv,
    "mpegts": _mpegts,
    "ogg": _ogg,
    "gif": _gif,
    "asf": _asf,
    "yuv4mpegpipe": _y4m,
    "apng": _png,
    "png_pipe": _png,
    "mjpeg": _jpeg,
    "jpeg_pipe": _jpeg,
}
