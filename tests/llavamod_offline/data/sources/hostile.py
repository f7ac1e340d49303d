"""Hostile files: tars, rows and images that no data set should contain, each beside a good sample."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tests.llavamod_offline.data.tars.foreign_tars import Entry, row, special, talk, write_tar
from tests.tiny import tiny_image

JPG, PNG = tiny_image(0, format="JPEG"), tiny_image(1)
GOOD: list[Entry] = [("good.json", row("<image>\nWhat?", "That.")), ("good.png", PNG)]
TALK = {"conversations": talk("Is it?", "Yes.")}
SHOWN = talk("<image>\nWhat?", "That.")
GOOD_ROW = {"id": "good", "image": "good.png", "conversations": SHOWN}


@dataclass(frozen=True)
class Case:
    """A hostile file; `rejected`: (key, kind, words of the reason); `error`: why no set is made.

    `good`: whether the good sample beside it gets into the set.
    """

    name: str
    write: Callable[[Path], None]
    rejected: tuple[tuple[str, str, str], ...] = ()
    error: str = ""
    good: bool = True


def bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """A PNG of one colour, a few kilobytes for every billion pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def gif() -> bytes:
    stream = io.BytesIO()
    Image.new("P", (4, 4)).save(stream, format="GIF")
    return stream.getvalue()


class Boom:
    """Unpickling it would leave a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("unpickled"), "boom"))


def deep() -> bytes:
    return b"[" * 100_000 + b"]" * 100_000


def _tar(name: str, entries: list[Entry], *rejected: tuple[str, str, str], **more: Any) -> Case:
    return Case(name, lambda folder: _write(folder, entries), rejected, **more)


def _write(folder: Path, entries: list[Entry]) -> None:
    write_tar(folder / "h.tar", [*GOOD, *entries])


def _raw(name: str, change: Callable[[bytes], bytes], *rejected: tuple[str, str, str], **more: Any) -> Case:
    """A tar with the good sample and a bad one, whose bytes are changed."""

    def write(folder: Path) -> None:
        _write(folder, [("bad.json", row("<image>?", "That.")), ("bad.jpg", JPG)])
        (folder / "h.tar").write_bytes(change((folder / "h.tar").read_bytes()))

    return Case(name, write, rejected, **more)


def _header(**fields: Any) -> bytes:
    """A tar header with a valid checksum, whatever its fields."""
    header = tarfile.TarInfo(fields.pop("name", "bad.jpg"))
    for name, value in fields.items():
        setattr(header, name, value)
    return header.tobuf(tarfile.GNU_FORMAT)


def _insert(content: bytes) -> Callable[[bytes], bytes]:
    """Put bytes before the members of `bad`."""
    return lambda tar: tar[: tar.index(b"bad.json")] + content + tar[tar.index(b"bad.json") :]


def _pair(key: str, text: bytes, image: bytes, suffix: str = "jpg") -> list[Entry]:
    return [(f"{key}.json", text), (f"{key}.{suffix}", image)]


ASK = row("<image>?", "That.")
PAX_BOMB = b"".join(_header(name="././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=0) for _ in range(3000))
BAD, IMAGE, MISMATCH, ROW = "bad member", "undecodable image", "placeholder mismatch", "malformed row"
PATH, MISSING = "bad image path", "missing image"

TARS = [
    _tar("absolute path", _pair("/etc/bad", ASK, JPG), ("_x2Fetc_x2Fbad", BAD, "leads out of the folder")),
    _tar("parent folder", _pair("../bad", ASK, JPG), ("_x2E_x2E_x2Fbad", BAD, "leads out of the folder")),
    _tar("parent folder within", _pair("a/../good", ASK, JPG), ("a_x2F_x2E_x2E_x2Fgood", BAD, "leads out")),
    _tar(
        "symbolic link",
        [("bad.json", ASK), special("bad.jpg", tarfile.SYMTYPE, "/etc/passwd")],
        ("bad", BAD, "a link to '/etc/passwd', not a plain file"),
    ),
    _tar(
        "hard link to nothing",
        [("bad.json", ASK), special("bad.png", tarfile.LNKTYPE, "none.png")],
        ("bad", BAD, "member 'bad.png': a link to 'none.png'"),
    ),
    _tar("hard link to a later member", [("bad.json", ASK), special("bad.png", tarfile.LNKTYPE, "k.jpg"),
         *_pair("k", ASK, JPG)], ("bad", BAD, "a link to 'k.jpg'")),
    _tar(
        "hard link out of the folder",
        [("bad.json", ASK), special("bad.png", tarfile.LNKTYPE, "/etc/passwd")],
        ("bad", BAD, "a link to '/etc/passwd'"),
    ),
    _tar("device", [("bad.json", ASK), special("bad.png", tarfile.CHRTYPE)], ("bad", BAD, "a device")),
    _tar("pipe", [special("bad.json", tarfile.FIFOTYPE)], ("bad", BAD, "a device")),
    _tar("sparse file", [("bad.json", ASK), special("bad.png", b"S")], ("bad", BAD, "a sparse file")),
    _tar("unknown type", [("bad.json", ASK), special("bad.png", b"Z")], ("bad", BAD, "of type b'Z'")),
    _tar("a folder for a picture", [("bad.json", ASK), special("bad.png", tarfile.DIRTYPE)], ("bad", MISMATCH, "")),
    _tar("two members of one name", [*_pair("bad", ASK, JPG), ("bad.jpg", PNG)], ("bad", BAD, "named 'bad.jpg'")),
    _tar("two texts of one name", [("bad.json", ASK), *_pair("bad", ASK, JPG)], ("bad", BAD, "named 'bad.json'")),
    _tar("one name in two cases", [*_pair("bad", ASK, JPG), ("bad.JPG", PNG)], ("bad", BAD, "two members")),
    _tar("two suffixes of one image", [*_pair("bad", ASK, JPG), ("bad.jpeg", PNG)], ("bad", BAD, "are the same image")),
    Case(
        "members that are not adjacent",
        lambda folder: _write_to(folder, [("bad.json", ASK), *GOOD, ("bad.jpg", JPG)]),
        (("bad", BAD, "are not adjacent"), ("bad", BAD, "are not adjacent")),
    ),
    Case(
        "a second sample of one key",
        lambda folder: _write_to(folder, [*GOOD, *_pair("k", ASK, JPG), *GOOD]),
        (("good", BAD, "are not adjacent"), ("good", BAD, "are not adjacent")),
        good=False,
    ),
    _tar("a pickle", [*_pair("bad", ASK, JPG), ("bad.pkl", pickle.dumps(Boom()))], ("bad", BAD, "'.pkl'")),
    _tar("a pickle for JSON", _pair("bad", pickle.dumps(Boom()), JPG), ("bad", ROW, "file 'bad.json': ")),
    _tar("a pickle for a picture", _pair("bad", ASK, pickle.dumps(Boom())), ("bad", IMAGE, "not a JPEG")),
    _tar("decompression bomb", _pair("bad", ASK, bomb(), "png"), ("bad", IMAGE, "shrink it")),
    _tar("a picture too wide", _pair("bad", ASK, bomb(9_001, 100), "png"), ("bad", IMAGE, "shrink it")),
    _tar("a picture cut short", _pair("bad", ASK, JPG[:200]), ("bad", IMAGE, "cannot be decoded")),
    _tar("a GIF called PNG", _pair("bad", ASK, gif(), "png"), ("bad", IMAGE, "convert it")),
    _tar("an empty picture", _pair("bad", ASK, b""), ("bad", IMAGE, "is empty")),
    _tar("a film", [("bad.json", ASK), ("bad.mp4", b"x")], ("bad", BAD, "'.mp4'")),
    _tar("a name without suffix", [("README", b"hello")], ("README", BAD, "not a key, a dot and a suffix")),
    _tar("a name without key", [(".bad.jpg", JPG)], ("_x2Ebad_x2Ejpg", BAD, "not a key, a dot and a suffix")),
    _tar("a folder whose name leads out", [special("../bad.png", tarfile.DIRTYPE)]),
    _tar("a picture without text", [("bad.jpg", JPG)], ("bad", ROW, "has no text")),
    _tar("a text without picture", [("bad.json", ASK)], ("bad", MISMATCH, "for 0 images")),
    _tar("a picture too many", _pair("bad", row("Is it?", "Yes."), JPG), ("bad", MISMATCH, "does not refer to")),
    _tar("other pictures than named", _pair("bad", row("<image>?", "A", image=["a", "b"]), JPG),
         ("bad", MISMATCH, "names 2")),
    _tar("pictures in no order", [("bad.json", ASK), ("bad.0.jpg", JPG), ("bad.jpg", PNG)], ("bad", BAD, "not all")),
    _tar("a gap", [("bad.json", ASK), ("bad.0.jpg", JPG), ("bad.2.jpg", PNG)], ("bad", BAD, "without gaps")),
    _tar("a long key", _pair("k" * 300, ASK, JPG), ("k" * 300, ROW, "key of 300 characters")),
    _tar("JSON without end", [("bad.json", deep())], ("bad", ROW, "JSON cannot be read")),
    _tar("JSON of another encoding", [("bad.json", '{"a": "ä"}'.encode("latin-1"))], ("bad", ROW, "iconv -f")),
    _tar("JSON of no sample", [("bad.json", b'{"width": 3}')], ("bad", ROW, "its JSON has 'width': expected")),
    _tar("a number of 5,000 digits", [("bad.json", b"9" * 5000)], ("bad", ROW, "cannot be read")),
    _tar(
        "another text than was hashed",
        [("bad.json", json.dumps({"format": 1, "turns": [["user", "A?"], ["assistant", "B"]], "images": [],
                                  "content_hash": "0" * 64, "source": ""}).encode())],
        ("bad", "bad conversation", "does not match the hash"),
    ),
    _tar(
        "a packed sample of wrong types",
        [("bad.json", json.dumps({"format": 1, "turns": [["user", 3], 7], "images": []}).encode())],
        ("bad", "bad conversation", "bad field"),
    ),
    _tar("a caption", [("bad.txt", b"A dog."), ("bad.jpg", JPG)], ("bad", ROW, "--caption-prompt")),
    _raw("a member cut short", lambda tar: tar[: tar.index(JPG) + 40], ("bad", "damaged tar", "40 of its")),
    _raw(
        "a header cut short",
        lambda tar: tar[: tar.index(b"bad.jpg") + 100],
        ("bad", MISMATCH, "for 0 images"),
        ("h", "damaged tar", "neither a member nor its end"),
    ),
    _raw("a size beyond the file", _insert(_header(size=2**33)), ("bad", "damaged tar", f"of its {2**33} bytes")),
    _raw("a size below nothing", _insert(_header(size=-1024)), ("h", "damaged tar", "invalid header")),
    _raw("a long name without end", _insert(_header(type=tarfile.GNUTYPE_LONGNAME, size=2**40)),
         ("h", "damaged tar", f"a header of {2**40} bytes")),
    _raw("headers without end", _insert(PAX_BOMB), ("h", "damaged tar", "recursion")),
    _raw("noise between members", _insert(b"noise!" * 100), ("h", "damaged tar", "neither a member nor its end")),
    _raw("bytes behind the end", lambda tar: tar + b"more", ("h", "damaged tar", "neither a member nor its end")),
    _raw("a compressed tar", gzip.compress, error="is compressed with gzip", good=False),
    _raw("no tar", lambda tar: b"hello, I am a tar", error="cannot be read from byte 0", good=False),
    _raw("an empty file", lambda tar: b"", error="empty", good=False),
]  # fmt: skip


def _write_to(folder: Path, entries: list[Entry]) -> None:
    write_tar(folder / "h.tar", entries)


def _rows(name: str, bad: Any, *rejected: tuple[str, str, str], **files: bytes) -> Case:
    """A JSON list with a bad row; `files`: further images by name, with underscores in place of dots."""

    def write(folder: Path) -> None:
        pictures(folder, files)
        (folder / "h.json").write_text(json.dumps([GOOD_ROW, bad]))

    return Case(name, write, rejected)


def _text(name: str, suffix: str, content: bytes, *rejected: tuple[str, str, str], **more: Any) -> Case:
    def write(folder: Path) -> None:
        pictures(folder, {})
        (folder / f"h{suffix}").write_bytes(content)

    return Case(name, write, rejected, **more)


def pictures(folder: Path, files: dict[str, bytes]) -> None:
    """Write the images that rows name."""
    (folder / "pictures").mkdir()
    for name, content in {"good_png": PNG, **files}.items():
        (folder / "pictures" / name.replace("_", ".")).write_bytes(content)


def _bad(**fields: Any) -> dict[str, Any]:
    return {"id": "bad", **fields}


GOOD_LINE = json.dumps(GOOD_ROW).encode()
CONVERSATION = "bad conversation"
ROWS = [
    _rows("a row of another type", 17, ("h-000000001", ROW, "expected an object, found int")),
    _rows("a row of rows", [TALK], ("h-000000001", ROW, "expected an object, found list")),
    _rows("no conversation", _bad(conversations=[]), ("bad", ROW, "at least one")),
    _rows("conversations of a wrong type", _bad(conversations={"from": "human"}), ("bad", ROW, "list of turns")),
    _rows("turns of a wrong type", _bad(conversations=["a", "b"]), ("bad", ROW, "turn 0")),
    _rows("text of a wrong type", _bad(conversations=[{"from": "human", "value": None}]), ("bad", ROW, "turn 0")),
    _rows("a speaker of a wrong type", _bad(conversations=[{"from": 1, "value": "a"}]), ("bad", ROW, "turn 0")),
    _rows("an id of a wrong type", TALK | {"id": [1]}, ("h-000000001", ROW, "'id' must be")),
    _rows("two human turns running", _bad(conversations=talk("a", "b")[:1] * 2), ("bad", CONVERSATION, "turn 1 is by")),
    _rows("the answer first", _bad(conversations=talk("a", "b")[1:]), ("bad", CONVERSATION, "turn 0 is by")),
    _rows("no answer", _bad(conversations=talk("a")), ("bad", CONVERSATION, "the last turn is by")),
    _rows("an empty answer", _bad(conversations=talk("a", " ")), ("bad", CONVERSATION, "is empty")),
    _rows("an unknown role", _bad(conversations=[{"from": "bot", "value": "a"}]), ("bad", CONVERSATION, "by 'bot'")),
    _rows("a system turn alone", _bad(conversations=[{"from": "system", "value": "a"}]),
          ("bad", CONVERSATION, "'system'")),
    _rows("a tool's turn", _bad(conversations=[{"from": "tool", "value": "a"}]),
          ("bad", CONVERSATION, "turn 0 is by 'tool'")),
    _rows("a film in a row", _bad(video="a.mp4", **TALK), ("bad", "unsupported media", "'video'")),
    _rows("equal answers", _bad(chosen=talk("a", "b"), rejected=talk("a", "b ")),
          ("bad", "identical answers", "are the same")),
    _rows("an image in an answer", _bad(conversations=talk("a", "<image>")), ("bad", CONVERSATION, "in an answer")),
    _rows("half a character", _bad(conversations=talk("a", "\ud800")), ("bad", CONVERSATION, "surrogate")),
    _rows("<image> without an image", _bad(conversations=SHOWN), ("bad", MISMATCH, "for 0 images")),
    _rows("one <image> too many", _bad(image="good.png", conversations=talk("<image><image>", "a")),
          ("bad", MISMATCH, "2 '<image>'")),
    _rows("one image too many", _bad(image=["good.png"] * 2, conversations=SHOWN), ("bad", MISMATCH, "for 2 images")),
    _rows("an image that is not shown", _bad(image="good.png", **TALK), ("bad", MISMATCH, "does not refer to")),
    _rows("an absolute image path", _bad(image="/etc/passwd", conversations=SHOWN), ("bad", PATH, "inside")),
    _rows("an image path that leads out", _bad(image="../h.json", conversations=SHOWN), ("bad", PATH, "inside")),
    _rows("an image path with a NUL", _bad(image="a\0b", conversations=SHOWN), ("bad", MISSING, "no such file")),
    _rows("a missing image", _bad(image="x.png", conversations=SHOWN), ("bad", MISSING, "no such file")),
    _rows("a bomb", _bad(image="b.png", conversations=SHOWN), ("bad", IMAGE, "shrink it"), b_png=bomb()),
    _rows("half a picture", _bad(image="b.png", conversations=SHOWN), ("bad", IMAGE, "decoded"), b_png=JPG[:200]),
    _rows("a pickle of a picture", _bad(image="b.png", conversations=SHOWN), ("bad", IMAGE, "convert it"),
          b_png=pickle.dumps(Boom())),
    _rows("different prompts", _bad(chosen=talk("a", "b"), rejected=talk("c", "d")),
          ("bad", CONVERSATION, "different prompts")),
    _rows("half a preference", _bad(chosen=talk("a", "b")), ("bad", ROW, "'rejected' must be")),
    _text("a line that is no JSON", ".jsonl", GOOD_LINE + b"\n{nothing\n", ("h-000000001", ROW, "not valid JSON")),
    _text("a line of a pickle", ".jsonl", GOOD_LINE + b"\n\x80\x04N.\n", ("h-000000001", ROW, "not valid JSON")),
    _text("a line without end", ".jsonl", GOOD_LINE + b"\n" + deep(), ("h-000000001", ROW, "not valid JSON")),
    _text("an object for a list", ".json", b'{"id": 1}', error="expected a JSON list", good=False),
    _text("a list cut short", ".json", b"[" + GOOD_LINE + b',{"id": "b', error="row 1 (character", good=False),
    _text("a list without end", ".json", b"[" + GOOD_LINE + b"," + deep(), error="row 1 (character", good=False),
    _text("the same id twice", ".jsonl", GOOD_LINE + b"\n" + GOOD_LINE, error="duplicate key 'good'", good=False),
    _text("no parquet", ".parquet", b"PAR1" + bytes(40) + b"PAR1", error="cannot be read as parquet", good=False),
    _text("a pickle for a table", ".parquet", pickle.dumps(Boom()), error="cannot be read as parquet", good=False),
]  # fmt: skip
