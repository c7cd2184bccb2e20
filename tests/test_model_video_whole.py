"""Whole files give every frame that is displayed; files that are cut or damaged are refused, in every run alike."""

from __future__ import annotations

import builtins
import io

import pytest
import torch
from video_clips import av, brightness, keep_bytes, noise, patch, shades, show_part, write_clip

from slowfast_model import _container, load_video

X264 = {"codec": "libx264", "codec_options": {"bf": "2"}}
KINDS = {
    "mp4": ("mp4", {**X264}),
    "mp4_index_in_front": ("mp4", {**X264, "options": {"movflags": "faststart"}}),
    "mp4_fragments": ("mp4", {**X264, "options": {"movflags": "frag_keyframe+empty_moov"}}),
    "mp4_live": ("mp4", {**X264, "live_format": "mp4", "options": {"movflags": "frag_every_frame+empty_moov"}}),
    "mov": ("mov", {}),
    "mkv": ("mkv", {**X264}),
    "mkv_live": ("mkv", {"live_format": "matroska"}),
    "webm": ("webm", {"codec": "libvpx"}),
    "flv": ("flv", {"codec": "flv"}),
    "flv_h264": ("flv", {**X264}),
    "flv_live": ("flv", {"codec": "flv", "live_format": "flv"}),
    "avi": ("avi", {}),
    "avi_h264": ("avi", {**X264}),
    "avi_live": ("avi", {"live_format": "avi"}),
    "ts_h264": ("ts", {**X264}),
    "ts_mpeg2": ("ts", {"codec": "mpeg2video", "rate": 25}),
    "ts_with_time_stamps": ("m2ts", {**X264}),
    "wmv": ("wmv", {"codec": "wmv2"}),
    "gif": ("gif", {"codec": "gif", "pixels": "rgb8"}),
    "mjpeg": ("mjpeg", {"codec": "mjpeg", "pixels": "yuvj420p"}),
    "ivf": ("ivf", {"codec": "libvpx"}),
    "mxf": ("mxf", {"codec": "mpeg2video", "rate": 25}),
    "y4m": ("y4m", {"codec": "wrapped_avframe"}),
    "ogg": ("ogv", {"codec": "libvpx"}),
    "apng": ("apng", {"codec": "apng", "pixels": "rgb24"}),
}
RAW = {  # no container: nothing says where they end
    "h264": ("h264", {**X264}),
    "mpeg2": ("m2v", {"codec": "mpeg2video", "rate": 25}),
    "mpeg_program_stream": ("mpg", {"codec": "mpeg2video", "rate": 25}),
}


def write_kind(directory, kind, num_frames, **options):
    suffix, coding = (KINDS | RAW)[kind]
    return write_clip(directory / f"clip.{suffix}", num_frames, **coding, **options)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """The bytes and name of a kind of file with 24 frames of noise, written once."""
    files = {}

    def get(kind):
        if kind not in files:
            path = write_kind(tmp_path_factory.mktemp(kind), kind, 24, picture=noise)
            files[kind] = path.name, path.read_bytes()
        return files[kind]

    return get


@pytest.mark.parametrize("kind", [*KINDS, *RAW])
@pytest.mark.parametrize("num_frames", [1, 20])
def test_a_whole_file_gives_every_frame(tmp_path, kind, num_frames):
    assert brightness(load_video(write_kind(tmp_path, kind, num_frames), num_frames)) == shades(num_frames)


CUTS = [(kind, kept) for kind in KINDS for kept in (60, 0.02, 0.3, 0.5, 0.77, 0.9, 0.99)]
CUTS.remove(("mxf", 0.99))  # in the index behind the last frame


@pytest.mark.parametrize(("kind", "kept"), CUTS)
def test_a_cut_file_is_refused(tmp_path, noisy, kind, kept):
    name, data = noisy(kind)
    path = tmp_path / name
    path.write_bytes(data[: int(len(data) * kept) if kept < 1 else kept])
    with pytest.raises(ValueError, match=r"path: got .*clip"):
        load_video(path, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", [1, 5, 40, 300])
def test_a_file_without_its_last_bytes_is_refused_or_lacks_no_frame(tmp_path, noisy, kind, missing):
    name, data = noisy(kind)
    whole, cut = tmp_path / f"whole_{name}", tmp_path / name
    whole.write_bytes(data)
    cut.write_bytes(data[:-missing])
    try:
        frames = load_video(cut, 24)
    except ValueError:
        return
    # What is missing lies behind the last frame: an index, or the byte that makes a chunk of AVI even.
    assert kind in ("mxf", "apng") or (kind, missing) == ("avi_live", 1)
    assert torch.equal(frames, load_video(whole, 24))


@pytest.mark.parametrize("kind", ["ts_h264", "ts_mpeg2", "h264", "mpeg2", "flv_h264", "mkv", "mp4_fragments"])
def test_the_answer_to_a_cut_file_is_the_same_every_time(tmp_path, noisy, kind):
    name, data = noisy(kind)
    path = tmp_path / name
    path.write_bytes(data[: len(data) // 2 // 188 * 188])  # whole packets of a transport stream
    for _ in range(6):
        with pytest.raises(ValueError, match="clip"):
            load_video(path, 4)


def test_a_raw_stream_cut_between_two_frames_is_a_shorter_one(tmp_path):
    path = write_clip(tmp_path / "clip.h264", 20, codec="libx264", codec_options={"bf": "0"})
    data = path.read_bytes()
    with av.open(str(path)) as container:
        sizes = [packet.size for packet in container.demux(video=0)]
    path.write_bytes(data[: sum(sizes[:13])])
    assert brightness(load_video(path, 13)) == shades(13)


def test_flv_tags_that_end_before_the_duration_are_refused(tmp_path):
    path = write_clip(tmp_path / "clip.flv", 20, codec="flv", picture=noise)
    data, position = path.read_bytes(), 13
    while position < len(data) * 0.8:  # a cut between two tags
        position += 11 + int.from_bytes(data[position + 1 : position + 4], "big") + 4
    with pytest.raises(ValueError, match=r"ends at 1.\d+ s of 2.00 s"):
        load_video(keep_bytes(path, position), 4)


def test_a_transport_stream_that_ends_inside_a_packet_is_refused(tmp_path):
    path = write_clip(tmp_path / "clip.ts", 40, codec="libx264")  # a frame is one packet
    data = path.read_bytes()
    for whole_packets in range(30, 40):
        path.write_bytes(data[: 188 * whole_packets + 50])
        with pytest.raises(ValueError, match="cut short"):
            load_video(path, 4)


def test_an_animated_png_that_ends_between_two_frames_is_refused(tmp_path):
    path = write_clip(tmp_path / "clip.apng", 20, codec="apng", pixels="rgb24")
    data = path.read_bytes()
    with pytest.raises(ValueError, match="cut short"):
        load_video(keep_bytes(path, data.index(b"fcTL", len(data) // 2) - 4), 4)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi", ".mov"])
@pytest.mark.parametrize("start", [0, 20], ids=["", "video_from_2_s_on"])
@pytest.mark.parametrize("audio_seconds", [1, 6])
def test_sound_may_be_longer_or_begin_before(tmp_path, suffix, start, audio_seconds):
    path = write_clip(tmp_path / f"clip{suffix}", 20, times=list(range(start, start + 20)), audio_seconds=audio_seconds)
    assert brightness(load_video(path, 20)) == shades(20)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".flv"])
def test_time_may_begin_far_from_zero(tmp_path, suffix):
    path = write_clip(tmp_path / f"clip{suffix}", 20, codec="libx264", times=list(range(100_000, 100_020)))
    assert brightness(load_video(path, 20)) == shades(20)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".flv", ".avi", ".mov"])
def test_frames_may_last_unequally_long(tmp_path, suffix):
    times = [0, 1, 2, 10, 11, 30, 31, 32, 50, 90]
    path = write_clip(tmp_path / f"clip{suffix}", 10, codec="libx264", times=times)
    assert brightness(load_video(path, 10)) == shades(10)


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize(("first", "seconds"), [(3.0, 2.0), (0.0, 1.0), (1.5, 4.5), (2.0, 100.0), (5.9, 0.1)])
def test_an_edit_list_shows_a_part_of_what_an_mp4_holds(tmp_path, reordered, first, seconds):
    coding = {"codec": "libx264", "codec_options": {"bf": "2"}} if reordered else {}
    path = write_clip(tmp_path / "clip.mp4", 60, **coding)
    show_part(path, first + (0.2 if reordered else 0), seconds)  # media time begins two frames before the first shown
    with av.open(str(path)) as container:
        shown = sum(1 for _ in container.decode(video=0))
    assert shown == min(round(seconds * 10), 60 - round(first * 10))
    assert brightness(load_video(path, shown)) == [(round(first * 10) + i) % 14 for i in range(shown)]


def test_an_edit_list_that_shows_no_frame_is_refused(tmp_path):
    path = show_part(write_clip(tmp_path / "clip.mp4", 60), 100.0, 1.0)
    with pytest.raises(ValueError, match="no video frames"):
        load_video(path, 4)


def test_repeated_pictures_of_an_avi_are_not_frames(tmp_path):
    times = [0, 1, 2, 5, 6, 9, 10, 11, 15, 16, 17, 20]
    path = write_clip(tmp_path / "clip.avi", 12, times=times)
    assert brightness(load_video(path, 12)) == shades(12)


@pytest.mark.parametrize("off", [-1, 1, 5, 1000])
def test_the_frame_count_of_an_avi_header_may_be_wrong(tmp_path, off):
    path = write_clip(tmp_path / "clip.avi", 20)
    patch(path, b"avih", 8 + 16, "<I", 20 + off)
    patch(path, b"strh", 8 + 32, "<I", 20 + off)
    assert brightness(load_video(path, 20)) == shades(20)


@pytest.mark.parametrize("factor", [0, 0.1, 0.5, 1.1, 30])
def test_the_duration_in_the_header_of_a_complete_file_may_be_wrong(tmp_path, factor):
    mp4 = write_clip(tmp_path / "clip.mp4", 20)
    patch(mp4, b"mvhd", 20, ">I", int(2000 * factor))
    mkv = write_clip(tmp_path / "clip.mkv", 20)
    patch(mkv, b"\x44\x89\x88", 3, ">d", 2000 * factor)
    for path in (mp4, mkv):
        assert brightness(load_video(path, 20)) == shades(20)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts", ".gif", ".flv"])
@pytest.mark.parametrize(
    "appended", [bytes(1), bytes(1000), b"abc", b"a note\n" * 5, b"TAG" + bytes(125), b"\xff" * 300], ids=len
)
def test_something_may_follow_the_video_in_its_file(tmp_path, suffix, appended):
    coding = {".gif": {"codec": "gif", "pixels": "rgb8"}, ".flv": {"codec": "flv"}}.get(suffix, {})
    path = write_clip(tmp_path / f"clip{suffix}", 20, **coding)
    path.write_bytes(path.read_bytes() + appended)
    assert brightness(load_video(path, 20)) == shades(20)


def test_open_groups_of_pictures(tmp_path):
    options = {"bf": "3", "x264-params": "open-gop=1:keyint=8:scenecut=0"}
    path = write_clip(tmp_path / "clip.mkv", 40, codec="libx264", codec_options=options)
    assert brightness(load_video(path, 40)) == shades(40)


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_a_stream_that_begins_between_key_frames_is_taken_from_the_first_on(tmp_path, codec):
    path = write_clip(
        tmp_path / "clip.ts", 60, codec=codec, rate=25, gop=20, codec_options={"bf": "0", "sc_threshold": "1000000000"}
    )
    whole = load_video(path, 60)
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    later = [number for number, (_, is_key) in enumerate(packets) if is_key and number >= 3]
    keep_bytes(path, slice(packets[3][0] // 188 * 188, None))
    assert torch.equal(load_video(path, 60 - later[0]), whole[later[0] :])


def test_joined_transport_streams_lack_nothing(tmp_path):
    path = write_clip(tmp_path / "clip.ts", 18, codec="libx264", picture=noise)
    once = load_video(path, 18)
    path.write_bytes(path.read_bytes() * 3)
    assert torch.equal(load_video(path, 54), once.repeat(3, 1, 1, 1))


def test_a_transport_stream_that_lost_a_packet_is_refused(tmp_path):
    path = write_clip(tmp_path / "clip.ts", 40, codec="libx264", picture=noise)
    data, refused = path.read_bytes(), 0
    for part in (0.2, 0.35, 0.5, 0.65, 0.8):
        position = int(len(data) // 188 * part) * 188
        while data[position + 1] & 0x5F != 1:  # inside a frame: no start of one, and no table of the stream
            position += 188
        path.write_bytes(data[:position] + data[position + 188 :])
        with pytest.raises(ValueError, match="damaged"):
            load_video(path, 4)
        refused += 1
    assert refused == 5


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_damage_inside_a_frame_is_refused_every_time(tmp_path, suffix):
    path = write_clip(tmp_path / f"clip{suffix}", 24, picture=noise)
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(b ^ 0x5A for b in data[middle : middle + 60]) + data[middle + 60 :])
    messages = set()
    for _ in range(4):
        with pytest.raises(ValueError, match=r"frame \d+") as refusal:
            load_video(path, 4)
        messages.add(str(refusal.value))
    assert len(messages) == 1


def test_damage_in_the_last_frame_is_refused_every_time(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", 24, picture=noise, codec_options={"bf": "2"})
    with av.open(str(path)) as container:
        last = max(packet.pos for packet in container.demux(video=0) if packet.size)
    data = bytearray(path.read_bytes())
    data[last + 800 : last + 900] = bytes(100)
    path.write_bytes(data)
    for _ in range(4):
        with pytest.raises(ValueError, match=r"frame 2[0-3]"):
            load_video(path, 4)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_packets_without_a_picture_are_no_frames(tmp_path, codec):
    source, path = write_clip(tmp_path / "clip.mp4", 10, codec=codec), tmp_path / "notes.mkv"
    message = {"libx264": b"\x06\x05\x01\x00\x80", "libx265": b"\x4e\x01\x05\x01\x00\x80"}[codec]  # an empty SEI
    with av.open(str(source)) as read, av.open(str(path), "w") as write:
        stream = write.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(video=0):
            if not packet.size:
                continue
            for data, shift in ((bytes(packet), 0), (len(message).to_bytes(4, "big") + message, 1)):
                copy = av.Packet(data)
                copy.stream, copy.time_base, copy.is_keyframe = stream, packet.time_base, packet.is_keyframe
                copy.pts, copy.dts = packet.pts + shift, packet.dts + shift
                write.mux(copy)
    assert brightness(load_video(path, 10)) == shades(10)


def test_empty_packets_are_no_frames(tmp_path):
    source, path = write_clip(tmp_path / "clip.mp4", 10), tmp_path / "empty.nut"
    with av.open(str(source)) as read, av.open(str(path), "w") as write:
        stream = write.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(video=0):
            if not packet.size:
                continue
            for data, shift in ((bytes(packet), 0), (b"", 1)):
                copy = av.Packet(data)
                copy.stream, copy.time_base, copy.is_keyframe = stream, packet.time_base, packet.is_keyframe
                copy.pts, copy.dts = packet.pts + shift, packet.dts + shift
                write.mux(copy)
    assert brightness(load_video(path, 10)) == shades(10)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".ts", ".avi"])
def test_a_read_error_is_not_the_end_of_the_file(tmp_path, monkeypatch, suffix):
    class Failing(io.FileIO):
        def read(self, length=-1):
            if self.tell() + length > 150_000:
                raise OSError(5, "Input/output error")
            return super().read(length)

    path = write_clip(
        tmp_path / f"clip{suffix}",
        60,
        codec="libx264",
        picture=noise,
        options={"movflags": "faststart"} if suffix == ".mp4" else None,
    )
    real = builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda name, *rest, **more: Failing(name) if name == path else real(name, *rest, **more)
    )
    with pytest.raises(ValueError, match="Input/output error"):
        load_video(path, 4)


def test_a_read_error_is_remembered_though_a_demuxer_may_pass_over_it():
    failure = OSError(5, "Input/output error")

    class Failing(io.BytesIO):
        def read(self, length=-1):
            raise failure

    source = _container._Source(Failing())
    with pytest.raises(OSError, match="Input/output"):
        source.read(10)
    assert source.error is failure


def test_a_file_that_cannot_be_read_on_is_refused(tmp_path):
    path = write_clip(tmp_path / "clip.y4m", 20, codec="wrapped_avframe")
    data = path.read_bytes()
    middle = data.index(b"FRAME", len(data) // 2)
    path.write_bytes(data[:middle] + b"frame" + data[middle + 5 :])
    with pytest.raises(ValueError, match="unreadable after 10 frames"):
        load_video(path, 4)


def test_metadata_need_not_be_unicode(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", 5, options=None)
    with av.open(str(path)) as read, av.open(str(tmp_path / "named.avi"), "w") as write:
        write.metadata["title"] = "XXXX"
        stream = write.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(video=0):
            if packet.size:
                packet.stream = stream
                write.mux(packet)
    named = patch(tmp_path / "named.avi", b"XXXX", 0, "4s", b"\xe9t\xe9\xff")
    assert brightness(load_video(named, 5)) == shades(5)
