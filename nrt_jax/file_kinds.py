"""What a file is when it is not what was asked for, told from its first bytes."""

import codecs
import json
import os
from pathlib import Path, PurePath

from nrt_jax.errors import InputError

HEAD_BYTES = 512
"""First bytes of a file that tell its kind."""

_COMPRESSED = "is compressed with {}; decompress it with {} and name the result"
_DOWNLOAD = "download the file itself"
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (GZIP_MAGIC, _COMPRESSED.format("gzip", "gunzip")),
    (ZSTD_MAGIC, _COMPRESSED.format("zstd", "unzstd")),
    (b"BZh", _COMPRESSED.format("bzip2", "bunzip2")),
    (b"\xfd7zXZ\x00", _COMPRESSED.format("xz", "unxz")),
    (b"\x04\x22\x4d\x18", _COMPRESSED.format("lz4", "unlz4")),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it with 7z x and name the file in it"),
    (b"PK\x03\x04", "is a zip archive; unpack it with unzip and name the file in it"),
    (b"PAR1", "is a Parquet file; rows in it are read with data.source=parquet"),
    (b"ARROW1", "is an Arrow file; write its rows as Parquet or JSON Lines"),
    (b"ORC", "is an ORC file; write its rows as Parquet or JSON Lines"),
    (b"Obj\x01", "is an Avro file; write its rows as Parquet or JSON Lines"),
    (b"SQLite format 3\x00", "is an SQLite database; write its rows as Parquet or JSON Lines"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file; convert it"),
    (b"GGUF", "is a GGUF file; name the safetensors that it was made from"),
    (b"%PDF", "is a PDF document; name a file of the right kind"),
    (
        b"version https://git-lfs.github.com/spec/",
        f"is a Git LFS pointer, not the file itself; run git lfs pull, or {_DOWNLOAD}",
    ),
    (b"/annex/objects/", f"is a git-annex pointer; run git annex get, or {_DOWNLOAD}"),
)
_ENCODINGS = {"utf-16": "UTF-16", "utf-32": "UTF-32"} | {
    f"utf-{bits}-{end}": f"UTF-{bits}{end.upper()}" for bits in (16, 32) for end in ("le", "be")
}


def recognise(head: bytes) -> str | None:
    """What a file with these first bytes is and what to do, such as "is a zip archive; unpack it".

    None when they may be UTF-8 text, or are of no kind known here.
    """
    for magic, told in _MAGIC:
        if head.startswith(magic):
            return told
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it with tar -xf and name the file in it"
    if head.lstrip(b"\xef\xbb\xbf \r\n\t")[:14].lower().startswith((b"<!doctype html", b"<html")):
        return f"is a web page, not the file; {_DOWNLOAD}"
    if head and not head.strip(b"\x00"):
        return "begins with zero bytes only, so it is damaged; copy or download it again"
    encoding = _wide_encoding(head)
    if encoding is not None:
        remedy = f"iconv -f {encoding} -t UTF-8 FILE > NEW_FILE"
        return f"is text in {encoding}; save it as UTF-8, as with: {remedy}"
    return None


def check_text(path: PurePath, head: bytes) -> None:
    """InputError for a file whose first bytes show that it is no UTF-8 text."""
    told = recognise(head)
    if told is not None:
        raise InputError(f"{path}: {told}")


def read_head(path: Path) -> bytes:
    """The first bytes of a file; none where there is no file that can be read."""
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""


def why_missing(path: Path) -> str:
    """ "no such file", or that it is a link to one; for a path that cannot be opened as missing."""
    if path.is_symlink() and not path.exists():
        return f"is a symbolic link to {os.readlink(path)}, which does not exist; restore it"
    if path.parent.is_file():
        return f"no such file, since {path.parent} is a file, not a directory"
    return "no such file"


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by a byte order mark, or by the zero bytes of the ASCII that JSON has."""
    name = json.detect_encoding(head[:4]) if len(head) >= 4 else "utf-8"
    if name not in _ENCODINGS:
        return None
    try:
        # Incrementally, since the head may end within a character.
        text = codecs.getincrementaldecoder(name)().decode(head)
    except UnicodeDecodeError:
        return None
    return None if "\x00" in text else _ENCODINGS[name]
