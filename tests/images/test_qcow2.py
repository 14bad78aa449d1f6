"""Our own page of the qcow2 format, held against what qemu-img writes."""

import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rig import headers
from rig.machines import MIB, create_encrypted, run

from qmpmerge.images import qcow2
from qmpmerge.images.qcow2 import Qcow2Header


def create(path: Path, *options: str, size: int = MIB) -> Qcow2Header:
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, str(size))
    header = qcow2.read(str(path))
    assert header is not None
    return header


def test_an_image_without_a_backing_file(tmp_path: Path) -> None:
    assert create(tmp_path / "a.qcow2") == Qcow2Header(MIB, None, None, None, encrypted=False)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-o", "compat=0.10"),
        ("-o", "cluster_size=512"),
        ("-o", "cluster_size=2M"),
        ("-o", "extended_l2=on"),
        ("-o", "compression_type=zstd"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["base.raw", "x" * 200, "a b,c%d'\"\n", "\u00fc", os.fsdecode(b"\xff.raw")], ids=ascii)
def test_names_are_read_as_they_are_written(name: str, options: tuple[str, ...], tmp_path: Path) -> None:
    header = create(tmp_path / "a.qcow2", "-u", "-b", name, "-F", "raw", *options)
    assert header == Qcow2Header(MIB, name, "raw", None, encrypted=False)


def test_the_longest_name(tmp_path: Path) -> None:
    assert create(tmp_path / "a.qcow2", "-u", "-b", "x" * 1023, "-F", "raw").backing == "x" * 1023


def test_no_format_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(headers.raw_header(b"base.raw"))
    header = qcow2.read(str(path))
    assert header is not None and (header.backing, header.backing_format) == ("base.raw", None)


def test_a_data_file(tmp_path: Path) -> None:
    header = create(tmp_path / "a.qcow2", "-o", f"data_file={tmp_path}/a.data")
    assert header.data_file == f"{tmp_path}/a.data"


@pytest.mark.parametrize("method", ["luks", "aes"])
def test_encrypted(method: str, tmp_path: Path) -> None:
    cheap = ",encrypt.iter-time=10,encrypt.hash-alg=sha512" if method == "luks" else ""
    secret = ("--object", "secret,id=s,data=x", "-o", f"encrypt.format={method},encrypt.key-secret=s{cheap}")
    path = tmp_path / "a.qcow2"
    create_encrypted(*secret, "-f", "qcow2", path, str(MIB))
    header = qcow2.read(str(path))
    assert header is not None
    assert header.encrypted


def test_what_is_no_qcow2(tmp_path: Path) -> None:
    for content in (b"", b"Q", b"QFI\xfa" + bytes(200), bytes(4096)):
        path = tmp_path / "file"
        path.write_bytes(content)
        assert qcow2.read(str(path)) is None


def test_a_fifo_or_a_device_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert qcow2.read(str(tmp_path / "fifo")) is None
    assert qcow2.read("/dev/zero") is None
    assert qcow2.read(str(tmp_path)) is None


def test_errors_of_the_system_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        qcow2.read(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("offset", "length"),
    [(8, b"\xff" * 8), (16, b"\xff" * 4), (16, struct.pack(">I", 1024)), (16, bytes(4))],
    ids=["offset", "length", "one-too-long", "empty"],
)
def test_a_name_that_cannot_be_is_no_header(offset: int, length: bytes) -> None:
    broken = bytearray(headers.raw_header(b"base.raw", b"raw"))
    broken[offset : offset + len(length)] = length
    assert qcow2.decode(bytes(broken)) is None


def test_extensions_that_run_past_the_end_are_left_out() -> None:
    broken = bytearray(headers.raw_header(b"base.raw", b"raw"))
    broken[108:112] = b"\xff" * 4
    header = qcow2.decode(bytes(broken))
    assert header is not None and (header.backing, header.backing_format) == ("base.raw", None)


def test_our_own_header_is_one_that_qemu_reads(tmp_path: Path) -> None:
    """So that tests with hand-made headers test what QEMU would do."""
    made = tmp_path / "made.qcow2"
    for version in (2, 3):
        made.write_bytes(headers.raw_header(b"base.raw", b"raw", version=version))
        assert qcow2.read(str(made)) == Qcow2Header(MIB, "base.raw", "raw", None, encrypted=False)


@given(st.binary(max_size=300), st.integers(2, 4))
def test_any_bytes_are_decoded_without_an_error(tail: bytes, version: int) -> None:
    qcow2.decode(struct.pack(">4sI", qcow2.MAGIC, version) + tail)


@given(st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255)), max_size=12))
def test_any_damage_is_survived(damage: list[tuple[int, int]]) -> None:
    data = bytearray(headers.raw_header(b"base.raw", b"raw", data_file=b"data"))
    for place, value in damage:
        data[place % len(data)] = value
    qcow2.decode(bytes(data))


@given(
    st.none() | st.binary(min_size=1, max_size=1023).filter(lambda name: b"\0" not in name),
    st.none() | st.sampled_from([b"raw", b"qcow2", b"luks"]),
    st.sampled_from([2, 3]),
)
def test_what_is_written_is_read(backing: bytes | None, form: bytes | None, version: int) -> None:
    header = qcow2.decode(headers.raw_header(backing, form, version=version))
    assert header is not None
    assert header.backing == (None if backing is None else os.fsdecode(backing))
    assert header.backing_format == (None if form is None else form.decode())


def test_what_looks_plain_qemu_opens(tmp_path: Path) -> None:
    """Each byte of a header spoiled in some ways: where nobody asks QEMU about the image it would have said nothing."""
    (tmp_path / "b.raw").touch()
    image = tmp_path / "a.qcow2"
    create(image, "-b", "b.raw", "-F", "raw")
    sound, plain = image.read_bytes(), 0
    for place in range(4, 112):
        for byte in {0, 0x80, sound[place] ^ 1} - {sound[place]}:
            image.write_bytes(sound[:place] + bytes([byte]) + sound[place + 1 :])
            try:
                is_plain = qcow2.read(str(image)) is not None and qcow2.is_plain(str(image))
            except OSError:
                continue
            if is_plain:
                told = json.loads(run("qemu-img", "info", "--output=json", "-f", "qcow2", image))
                assert not told["format-specific"]["data"].get("corrupt") and "bitmaps" not in told
                plain += 1
    assert plain > 10, "or nothing was asked"


@pytest.mark.parametrize("form", [(), ("cluster_size=512",), ("cluster_size=2M",), ("extended_l2=on",)], ids=str)
def test_what_qemu_makes_is_plain(form: tuple[str, ...], tmp_path: Path) -> None:
    create(tmp_path / "a.qcow2", *(word for option in form for word in ("-o", option)), size=64 * MIB)
    assert qcow2.is_plain(str(tmp_path / "a.qcow2"))
    run("qemu-io", "-c", "write 0 1M", tmp_path / "a.qcow2")
    assert qcow2.is_plain(str(tmp_path / "a.qcow2"))
    run("qemu-img", "bitmap", "--add", tmp_path / "a.qcow2", "bits")
    assert not qcow2.is_plain(str(tmp_path / "a.qcow2"))
