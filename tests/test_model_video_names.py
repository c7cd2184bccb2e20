"""A name is that of a local file, whatever it looks like, and a file that is no video is refused with the cause."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
from video_clips import av, brightness, gray, noise, shades, write_clip

from slowfast_model import load_video

NAMES = [
    "12:30 talk.mp4",
    "a%03d.mp4",
    "frame%d.png",
    "frames*.mp4",
    "what?.mp4",
    "[a]{b}.mp4",
    "clip #1 'x' & y.mp4",
    'a "quoted" name.mp4',
    "vidéo 视频.mp4",
    "-dash.mp4",
    "-",
    "no_suffix",
    "movie.txt",
    "movie.png",
    "movie.m3u8",
    "movie.sdp",
    "file:x.mp4",
    "concat:a.mp4|b.mp4",
    "pipe:0",
    "data:video",
    "subfile,,start,0,end,100,,:a.mp4",
    "async:x.mp4",
    "cache:x.mp4",
    "crypto:x.mp4",
    "https:x.mp4",
    "~",
    "$HOME.mp4",
    "two\nlines.mp4",
    "back\\slash.mp4",
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 10).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_that_of_a_local_file(tmp_path, monkeypatch, clip, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(clip)
    assert brightness(load_video(name, 10)) == shades(10)


def test_a_name_that_looks_like_an_address_is_a_local_file_too(tmp_path, monkeypatch, clip):
    monkeypatch.chdir(tmp_path)
    Path("http:/example.com").mkdir(parents=True)
    Path("http://example.com/x.mp4").write_bytes(clip)
    assert brightness(load_video("http://example.com/x.mp4", 10)) == shades(10)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("~",)])
def test_a_name_without_a_file_is_not_found(tmp_path, monkeypatch, clip, name):
    monkeypatch.chdir(tmp_path)
    for other in ("a.mp4", "b.mp4", "x.mp4", "a000.mp4", "a001.mp4", "frame0.png", "frames1.mp4", "whatx.mp4"):
        Path(other).write_bytes(clip)
    with pytest.raises(FileNotFoundError) as error:
        load_video(name, 4)
    assert name in str(error.value)


@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "rtsp", "tcp", "file"])
def test_an_address_is_not_fetched(monkeypatch, scheme):
    monkeypatch.setattr(socket, "socket", None)
    with pytest.raises(FileNotFoundError, match="no such video file"):
        load_video(f"{scheme}://127.0.0.1:9/x.mp4")


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
def test_names_of_every_kind(tmp_path, clip, kind):
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip)
    assert brightness(load_video(kind(path), 10)) == shades(10)


@pytest.mark.skipif(sys.platform != "linux", reason="names need not be unicode on Linux alone")
def test_a_name_need_not_be_unicode(tmp_path, clip):
    path = os.fsencode(tmp_path) + b"/\xe9t\xe9.mp4"
    with open(path, "wb") as file:
        file.write(clip)
    assert brightness(load_video(path, 10)) == shades(10)
    assert brightness(load_video(os.fsdecode(path), 10)) == shades(10)


@pytest.mark.parametrize("path", [None, 3, 3.5, ["clip.mp4"], memoryview(b"clip.mp4")], ids=lambda x: type(x).__name__)
def test_what_is_no_name_is_refused(path):
    with pytest.raises(TypeError, match="path: got"):
        load_video(path)


def test_an_open_file_is_refused(tmp_path, clip):
    (tmp_path / "clip.mp4").write_bytes(clip)
    with open(tmp_path / "clip.mp4", "rb") as file, pytest.raises(TypeError, match="path: got BufferedReader"):
        load_video(file)


def test_a_name_with_a_null_character_is_refused():
    with pytest.raises(ValueError, match="path: got"):
        load_video("clip\0.mp4")


def test_a_name_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match=r"path: got .*(?i:too long)"):
        load_video("x" * 5000)


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="directory"):
        load_video(tmp_path)


def test_a_path_through_a_file_is_not_found(tmp_path, clip):
    (tmp_path / "clip.mp4").write_bytes(clip)
    with pytest.raises(FileNotFoundError):
        load_video(tmp_path / "clip.mp4" / "clip.mp4")


def test_a_link_to_nowhere_is_not_found(tmp_path):
    (tmp_path / "link.mp4").symlink_to(tmp_path / "absent.mp4")
    with pytest.raises(FileNotFoundError, match=r"link\.mp4"):
        load_video(tmp_path / "link.mp4")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ValueError, match="a pipe"):
        load_video(tmp_path / "pipe.mp4")


def test_a_file_that_may_not_be_opened_names_the_cause(tmp_path, clip, monkeypatch):
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=r"clip\.mp4.*Permission denied"):
        load_video(path)


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(ValueError, match="an empty file"):
        load_video(tmp_path / "clip.mp4")


TEXTS = {
    "notes.txt": b"plain words\n" * 100,
    "colours.txt": b"\x1b[31mred\x1b[0m \x1b[1;1Hhome\n" * 200,
    "page.mp4": b"<!DOCTYPE html><html><body>404: not found</body></html>",
    "answer.mp4": b'{"error": "not found"}',
    "code.py": b"import os\nprint(os.name)\n" * 30,
    "table.csv": b"1,2,3\n" * 300,
    "zeros.mp4": bytes(10_000),
    "random.mp4": noise(1, 64, 64).tobytes(),
    "one.mp4": b"x",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_that_is_no_video_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(TEXTS[name])
    with pytest.raises(ValueError, match="no readable video"):
        load_video(tmp_path / name)


def test_subtitles_are_no_video(tmp_path):
    (tmp_path / "words.srt").write_bytes(b"1\n00:00:00,000 --> 00:00:01,000\nhello\n\n" * 3)
    with pytest.raises(ValueError, match="no video stream"):
        load_video(tmp_path / "words.srt")


def test_a_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load_video(tmp_path / "clip.mp4")


def test_a_codec_that_is_not_decoded_is_named(tmp_path):
    (tmp_path / "drawing.svg").write_bytes(b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>')
    with pytest.raises(ValueError, match="codec"):
        load_video(tmp_path / "drawing.svg")


MPD = b"""<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet
mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>%s</BaseURL></Representation></AdaptationSet>
</Period></MPD>"""
LISTS = {
    "list.m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4.0,\n%s\n#EXT-X-ENDLIST\n",
    "list.ffconcat": b"ffconcat version 1.0\nfile '%s'\n",
    "list.mpd": MPD,
    "list.pls": b"[playlist]\nFile1=%s\nNumberOfEntries=1\n",
    "list.asx": b'<asx version="3.0"><entry><ref href="%s"/></entry></asx>',
    "list.sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=x:%s\n",
}


@pytest.mark.parametrize(
    "target", ["clip.ts", "http://127.0.0.1:{port}/clip.ts", "file:clip.ts", "data:video/mp2t;base64,AA=="]
)
@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_other_files_opens_none_of_them(tmp_path, monkeypatch, kind, target):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.ts", 10, codec="mpeg2video", rate=25)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        target = target.format(port=server.getsockname()[1])
        (tmp_path / kind).write_bytes(LISTS[kind] % target.encode())
        with pytest.raises(ValueError, match="list"):
            load_video(kind)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_pattern_of_names_does_not_read_a_row_of_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, shade in (("frame0.png", 1), ("frame1.png", 2), ("frame%d.png", 3)):
        picture = lambda number, width, height, shade=shade: gray(shade, width, height)  # noqa: E731
        write_clip(Path(name), 1, codec="png", pixels="rgb24", live_format="image2pipe", picture=picture)
    assert brightness(load_video("frame%d.png", 3)) == [3, 3, 3]


def test_reading_needs_pyav(tmp_path, clip, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(clip)
    assert av.__name__ == "av"
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        load_video(tmp_path / "clip.mp4")
