"""Files of another kind are told by their first bytes, and no file of text is taken for one."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile

import pytest

from nrt_jax.errors import InputError
from nrt_jax.file_kinds import HEAD_BYTES, check_text, read_head, recognise, why_missing

TEXT = '{"question": "1+2 größer 数 🙂", "answer": "3"}\n' * 20
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def archive(kind: str) -> bytes:
    content = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(content, "w") as file:
            file.writestr("rows.jsonl", TEXT)
    else:
        with tarfile.open(fileobj=content, mode="w") as file:
            file.addfile(tarfile.TarInfo("rows.jsonl"), io.BytesIO(TEXT.encode()))
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(TEXT.encode()), "is compressed with gzip; decompress it with gunzip"),
        (bz2.compress(TEXT.encode()), "is compressed with bzip2; decompress it with bunzip2"),
        (lzma.compress(TEXT.encode()), "is compressed with xz; decompress it with unxz"),
        (b"\x28\xb5\x2f\xfd\x24\x00", "is compressed with zstd; decompress it with unzstd"),
        (archive("zip"), "is a zip archive; unpack it with unzip"),
        (archive("tar"), "is a tar archive; unpack it with tar -xf"),
        (b"PAR1\x15\x04", "is a Parquet file; rows in it are read with data.source=parquet"),
        (LFS.encode(), "is a Git LFS pointer, not the file itself; run git lfs pull"),
        (b"\n <!DOCTYPE HTML><html>", "is a web page, not the file; download the file itself"),
        (b"<html lang='en'>", "is a web page"),
        (b"\0" * 600, "begins with zero bytes only, so it is damaged"),
        (TEXT.encode("utf-16"), "is text in UTF-16; save it as UTF-8, as with: iconv -f UTF-16 -t"),
        (TEXT.encode("utf-16-le"), "is text in UTF-16LE; "),
        (TEXT.encode("utf-16-be"), "is text in UTF-16BE; "),
        (TEXT.encode("utf-32"), "is text in UTF-32; "),
        (TEXT.encode("utf-32-le"), "is text in UTF-32LE; "),
        (TEXT.encode("utf-32-be"), "is text in UTF-32BE; "),
        (("[🙂" * 300).encode("utf-16-le")[:HEAD_BYTES], "is text in UTF-16LE; "),
    ],
    # Archives hold the time, and every worker must collect the same names.
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_kinds(content, said, tmp_path):
    assert recognise(content[:HEAD_BYTES]).startswith(said)
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        check_text(path, read_head(path))
    assert str(caught.value).startswith(f"{path}: {said}")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        b"a\n",
        "数学".encode(),
        b"<|user|> {{ x }}",
        b"question,answer\n",
        b"\xff\xfe{",
        # Beginnings of safetensors: the length of the header in 8 bytes, then the header.
        *((n).to_bytes(8, "little") + b'{"__metadata__":{' for n in (88, 200, 256, 512, 70_000)),
    ],
)
def test_texts_and_files_of_unknown_kinds(content):
    assert recognise(content) is None


def test_why_a_file_is_missing(tmp_path):
    assert why_missing(tmp_path / "none") == "no such file"
    os.symlink("/nowhere/blob", tmp_path / "link")
    assert why_missing(tmp_path / "link") == (
        "is a symbolic link to /nowhere/blob, which does not exist; restore it"
    )
    (tmp_path / "file").touch()
    assert why_missing(tmp_path / "file" / "below") == (
        f"no such file, since {tmp_path / 'file'} is a file, not a directory"
    )
    assert read_head(tmp_path / "none") == read_head(tmp_path) == b""
