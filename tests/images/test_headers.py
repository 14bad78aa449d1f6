"""What the headers on disk say, read without following them anywhere."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from rig import machines
from rig.headers import may_trace
from rig.machines import SIZE, make_chain, run

import qmpmerge
from qmpmerge.chain import backing
from qmpmerge.chain.backing import leads_to
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.images import headers
from qmpmerge.images.headers import Oddity


def as_qemu_has_it(*images: tuple[Path, str | None, str | None]) -> Chain:
    """The chain in QEMU's memory, base first: file, backing name and backing format as QEMU read them."""
    told = []
    for file, name, form in images:
        status = file.stat()
        told.append(
            Image(
                file=str(file),
                format=file.suffix[1:],
                virtual_size=SIZE,
                backing=name,
                backing_format=form,
                inode=(status.st_dev, status.st_ino),
            )
        )
    return Chain(tuple(told))


def chain_of(folder: Path) -> Chain:
    """base.raw <-- a.qcow2 <-- b.qcow2, headers and QEMU's memory agreeing."""
    base, a, b = make_chain(folder, ["base.raw", "a.qcow2", "b.qcow2"])
    return as_qemu_has_it((base, None, None), (a, "base.raw", "raw"), (b, "a.qcow2", "qcow2"))


def rebase(image: Image, backing: Path | str, form: str | None = None) -> None:
    """Change the backing name in a header, behind everybody's back; nothing is opened."""
    recorded = ["-F", form] if form is not None else []
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", backing, *recorded, image.file)


async def look(chain: Chain) -> list[Oddity]:
    return headers.oddities(chain, await headers.read(chain))


def short(odd: list[Oddity]) -> list[tuple[str, str]]:
    return [(oddity.name, os.path.basename(oddity.file)) for oddity in odd]


# --- agreement and disagreement ------------------------------------------------------------------------------------


async def test_headers_that_agree(tmp_path: Path) -> None:
    chain = chain_of(tmp_path)
    found = await headers.read(chain)
    assert not headers.oddities(chain, found)
    assert [(header.file, header.format, header.virtual_size, header.backing, header.backing_format)
            for header in found if header is not None] == [
        (str(tmp_path / "base.raw"), "raw", SIZE, None, None),
        (str(tmp_path / "a.qcow2"), "qcow2", SIZE, "base.raw", "raw"),
        (str(tmp_path / "b.qcow2"), "qcow2", SIZE, "a.qcow2", "qcow2"),
    ]  # fmt: skip
    assert headers.as_written(chain, found) == chain


async def test_a_live_chain_whose_header_is_changed_behind_qemu_s_back(tmp_path: Path) -> None:
    make_chain(tmp_path)
    with machines.machine(tmp_path, "-drive", "if=none,id=vda,file=c.qcow2,format=qcow2") as machine:
        async with qmpmerge.live(machine.target) as target:
            before = await target.chain("vda")
            rewrite(tmp_path / "b.qcow2", b"a.qcow2", b"other.qcow2")
            after = await target.chain("vda")
    assert not before.oddities
    assert after.chain.files == before.chain.files, "QEMU still uses the old chain"
    assert [image.backing for image in after.chain] == [None, "base.raw", "other.qcow2", "b.qcow2"]
    assert short(list(after.oddities)) == [("disagrees", "b.qcow2")]


def rewrite(file: Path, old: bytes, new: bytes) -> None:
    """Put another backing name into a qcow2 header, as no lock of QEMU's can prevent."""
    with open(file, "r+b") as image:
        head = image.read(65536)
        place = head.index(old, 100)
        image.seek(place)
        image.write(new)
        image.seek(16)
        image.write(len(new).to_bytes(4, "big"))


async def test_a_header_that_names_another_image_of_the_chain(tmp_path: Path) -> None:
    chain = chain_of(tmp_path)
    rebase(chain[3], "base.raw", "raw")
    odd = await look(chain)
    assert short(odd) == [("disagrees", "b.qcow2")]
    assert "base.raw" in odd[0].message and chain[2].file in odd[0].message


async def test_a_header_that_names_nothing(tmp_path: Path) -> None:
    chain = chain_of(tmp_path)
    rebase(chain[3], "")
    assert short(await look(chain)) == [("disagrees", "b.qcow2")]


async def test_a_base_that_names_a_backing_file(tmp_path: Path) -> None:
    chain = chain_of(tmp_path)
    odd = await look(Chain(chain.images[1:]))
    assert short(odd) == [("disagrees", "a.qcow2")]
    assert "base.raw" in odd[0].message


async def test_no_backing_format_recorded(tmp_path: Path) -> None:
    chain = chain_of(tmp_path)
    forget_format(chain[2])
    odd = await look(chain)
    assert short(odd) == [("no-format", "a.qcow2")]


def forget_format(image: Image) -> None:
    """Make the header extension of the backing format (0xE2792ACA) one that nobody knows: ignored by the rules."""
    with open(image.file, "r+b") as file:
        place = file.read(65536).index(bytes.fromhex("e2792aca"))
        file.seek(place)
        file.write(b"none")


async def test_a_renamed_file_cannot_be_read(tmp_path: Path) -> None:
    chain = chain_of(tmp_path)
    os.rename(chain[2].file, tmp_path / "away.qcow2")
    # b's header and QEMU still agree about the name; that it leads elsewhere is for `targets.identity` to tell.
    assert short(await look(chain)) == [("unreadable", "a.qcow2")]


@pytest.mark.parametrize("content", [b"", b"QFI\xfb", b"no qcow2 at all" * 100, b"QFI\xfb\0\0\0\x03" + b"\xff" * 600])
async def test_a_broken_header_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    chain = chain_of(tmp_path)
    Path(chain[2].file).write_bytes(content)
    assert ("unreadable", "a.qcow2") in short(await look(chain))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
async def test_a_file_that_we_may_not_read(tmp_path: Path) -> None:
    chain = chain_of(tmp_path)
    os.chmod(chain[2].file, 0)
    assert short(await look(chain)) == [("unreadable", "a.qcow2")]


async def test_what_cannot_be_read_keeps_what_qemu_told(tmp_path: Path) -> None:
    chain = chain_of(tmp_path)
    assert headers.as_written(chain, (None, None, None)) == chain
    found = await headers.read(chain)
    stale = Chain((chain[1], chain[2], replace(chain[3], backing="old", backing_format=None)))
    assert headers.as_written(stale, found) == chain


async def test_images_without_a_path_have_no_header_to_read(tmp_path: Path) -> None:
    (overlay,) = make_chain(tmp_path, ["a.qcow2"])
    remote = Image(file="nbd+unix://?socket=/nowhere/nbd", format="raw", virtual_size=SIZE)
    local = as_qemu_has_it((overlay, "nbd+unix:///?socket=/nowhere/nbd", "raw")).active
    run("qemu-img", "rebase", "-u", "-b", "nbd+unix:///?socket=/nowhere/nbd", "-F", "raw", overlay)
    chain = Chain((remote, local))
    assert (await headers.read(chain))[0] is None
    assert not await look(chain)


# --- where a name leads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backing", "leads"),
    [
        ("base.raw", True),
        ("./base.raw", True),
        ("../disks/base.raw", True),
        ("file:base.raw", True),
        ("{folder}/base.raw", True),
        ("file:{folder}/base.raw", True),
        ("link", True),
        ("other.raw", False),
        ("missing.raw", False),
        ("", False),
        ("/dev/null", False),
        ('json:{{"driver":"raw","file":{{"driver":"file","filename":"{folder}/base.raw"}}}}', True),
        ('json:{{"driver":"raw","size":8388608,"file":{{"driver":"file","filename":"{folder}/base.raw"}}}}', True),
        ('json:{{"driver":"raw","offset":512,"file":{{"driver":"file","filename":"{folder}/base.raw"}}}}', False),
        ('json:{{"driver":"raw","file":{{"driver":"file","filename":"{folder}/other.raw"}}}}', False),
        ('json:{{"driver":"raw","file":{{"driver":"file","filename":"base.raw"}}}}', None),
        ('json:{{"driver":"raw","file":{{"driver":"file","filename":"{folder}/base.raw","aio":"native"}}}}', None),
        ('json:{{"file.filename":"{folder}/base.raw"}}', None),
        ("nbd://127.0.0.1:1/", False),
    ],
)
def test_leads_to(tmp_path: Path, backing: str, leads: bool | None) -> None:
    folder = tmp_path / "disks"
    folder.mkdir()
    make_chain(folder, ["other.raw"])
    base, overlay = make_chain(folder, ["base.raw", "a.qcow2"])
    (folder / "link").symlink_to(base)
    chain = as_qemu_has_it((base, None, None), (overlay, None, None))
    assert leads_to(chain.active, backing.format(folder=folder), chain.base) is leads


def test_a_uri_leads_to_the_same_uri(tmp_path: Path) -> None:
    (overlay,) = make_chain(tmp_path, ["a.qcow2"])
    image = as_qemu_has_it((overlay, None, None)).active
    remote = Image(file="nbd://host:1/x", format="raw", virtual_size=SIZE)
    assert backing.leads_to(image, "nbd://host:1/x", remote) is True
    assert backing.leads_to(image, "nbd:host:1:exportname=x", remote) is None, "another way to write it"


def test_relative_names_lead_from_the_link_and_from_the_file(tmp_path: Path) -> None:
    base, overlay = make_chain(tmp_path, ["base.raw", "a.qcow2"])
    links = tmp_path / "links"
    links.mkdir()
    (links / "disk").symlink_to(overlay)
    (links / "beside.raw").symlink_to(base)
    told = as_qemu_has_it((base, None, None), (overlay, "base.raw", "raw"))
    image = replace(told.active, file=str(links / "disk"))
    assert backing.folders(image) == (str(links), str(tmp_path))
    assert backing.folders(told.active) == (str(tmp_path),)
    assert backing.leads_to(image, "base.raw", told.base) is True, "from the file"
    assert backing.leads_to(image, "beside.raw", told.base) is True, "from the link, as QEMU resolves it"
    assert backing.leads_to(image, "elsewhere.raw", told.base) is False


async def test_a_chain_of_links(tmp_path: Path) -> None:
    files = make_chain(tmp_path, ["base.raw", "a.qcow2", "b.qcow2"])
    links = tmp_path / "links"
    links.mkdir()
    told = []
    for file, name in zip(files, (None, "base.raw", "a.qcow2"), strict=True):
        (links / file.name).symlink_to(file)
        form = name.rpartition(".")[2] if name else None
        told.append((links / file.name, name, form))
    assert not await look(as_qemu_has_it(*told))


# --- hostile headers -----------------------------------------------------------------------------------------------


@contextmanager
def fifo(path: Path) -> Iterator[list[str]]:
    """A FIFO; the list is not empty once somebody has opened it for reading. Nobody hangs on it: he reads its end."""
    os.mkfifo(path)
    readers: list[str] = []
    done = threading.Event()

    def write() -> None:
        descriptor = os.open(path, os.O_WRONLY)  # returns when there is a reader
        if not done.is_set():
            readers.append(str(path))
        os.close(descriptor)
        while not done.is_set():  # a prober opens it again and again
            with open(path, "wb"):
                pass

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield readers
    finally:
        done.set()
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # open until the writer has come
        writer.join()
        os.close(reader)


@asynccontextmanager
async def listener() -> AsyncIterator[tuple[str, list[str]]]:
    """An address, and the connections made to it."""
    connections: list[str] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(str(writer.get_extra_info("peername")))
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(note, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"nbd://127.0.0.1:{port}/", connections


HOSTILE = [(position, known) for position in (1, 2, 3) for known in (True, False)]


@pytest.mark.parametrize(("position", "known"), HOSTILE)
async def test_a_name_that_connects_is_not_followed(tmp_path: Path, position: int, known: bool) -> None:
    """`known`: whether QEMU has the name in its memory too, as with an explicit `-blockdev` chain."""
    chain = qcow2_chain(tmp_path)
    async with listener() as (uri, connections):
        await hostile(chain, position, uri, known)
        assert not connections


@pytest.mark.parametrize(("position", "known"), HOSTILE)
async def test_a_fifo_is_not_opened(tmp_path: Path, position: int, known: bool) -> None:
    chain = qcow2_chain(tmp_path)
    with fifo(tmp_path / "fifo") as readers:
        odd = await hostile(chain, position, str(tmp_path / "fifo"), known)
        assert not readers
    assert ("disagrees", os.path.basename(chain[position].file)) in short(odd)


def qcow2_chain(folder: Path) -> Chain:
    base, a, b = make_chain(folder, ["base.qcow2", "a.qcow2", "b.qcow2"])
    return as_qemu_has_it((base, None, None), (a, "base.qcow2", "qcow2"), (b, "a.qcow2", "qcow2"))


async def hostile(chain: Chain, position: int, name: str, known: bool) -> list[Oddity]:
    """Read the chain after one of its headers was made to name something else."""
    rebase(chain[position], name, "raw")
    images = list(chain.images)
    if known:
        images[position - 1] = replace(chain[position], backing=name, backing_format="raw")
    return await look(Chain(tuple(images)))


async def test_a_raw_base_is_not_probed(tmp_path: Path) -> None:
    """The guest wrote a qcow2 header into its raw disk, and the overlay's header records no format."""
    chain = chain_of(tmp_path)
    async with listener() as (uri, connections):
        run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", uri, "-F", "raw", tmp_path / "evil", "8M")
        with open(chain.base.file, "r+b") as disk:
            disk.write((tmp_path / "evil").read_bytes())
        forget_format(chain[2])
        seen = Chain((chain[1], replace(chain[2], backing_format=None), chain[3]))
        odd = await look(seen)
        assert not connections
    assert short(odd) == [("no-format", "a.qcow2")]


async def test_a_data_file_is_not_opened(tmp_path: Path) -> None:
    data = tmp_path / "data"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data}", tmp_path / "a.qcow2", str(SIZE))
    data.unlink()
    with fifo(data) as readers:
        assert not await look(as_qemu_has_it((tmp_path / "a.qcow2", None, None)))
        assert not readers


READ = """
import asyncio, json, sys
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.images import headers
images = tuple(Image(**{**told, "inode": tuple(told["inode"])}) for told in json.load(sys.stdin))
asyncio.run(headers.read(Chain(images)))
"""


@pytest.mark.skipif(not may_trace(), reason="strace is needed, and leave to use it")
@pytest.mark.parametrize("known", [True, False])
def test_nobody_opens_what_a_header_names(tmp_path: Path, known: bool) -> None:
    chain = qcow2_chain(tmp_path)
    rebase(chain[2], "/etc/passwd", "raw")
    if known:
        chain = Chain((chain[1], replace(chain[2], backing="/etc/passwd", backing_format="raw"), chain[3]))
    log = tmp_path / "calls"
    told = json.dumps([vars(image) for image in chain])
    traced = ["strace", "-f", "-qq", "-e", "trace=execve,open,openat,openat2,connect", "-o", str(log), sys.executable]
    # What python and its libraries do with /etc/passwd is no concern of ours: only qemu-img is looked at.
    subprocess.run([*traced, "-c", READ], input=told, text=True, check=True, cwd=tmp_path)
    calls = log.read_text().splitlines()
    readers = {call.split()[0] for call in calls if "execve" in call and "qemu-img" in call and call.endswith("= 0")}
    opened = [call for call in calls if call.split()[0] in readers and '"/etc/passwd"' in call]
    assert not opened


# --- many ----------------------------------------------------------------------------------------------------------


async def test_names_that_qemu_does_not_have_are_found(tmp_path: Path) -> None:
    """What counts is what stands on disk, and every header stands in its place."""
    names = [f"l{number}.qcow2" for number in range(12)]
    files = make_chain(tmp_path, names)
    backing = [None, *names[:-1]]
    told = [(file, name and f"other-{name}", "qcow2") for file, name in zip(files, backing, strict=True)]
    found = await headers.read(as_qemu_has_it(*told))
    assert [header.backing for header in found if header is not None] == backing


async def test_1000_layers(tmp_path: Path) -> None:
    chain = long_chain(tmp_path, 1000)
    found = await headers.read(chain)
    assert [header.backing for header in found if header is not None] == [image.backing for image in chain]
    assert not headers.oddities(chain, found)


def long_chain(folder: Path, count: int) -> Chain:
    """Headers that differ in one name of the same length."""
    names = [f"l{number:04}.qcow2" for number in range(count)]
    make_chain(folder, names[:2])
    template = (folder / names[1]).read_bytes()
    for below, name in pairwise(names[1:]):
        (folder / name).write_bytes(template.replace(names[0].encode(), below.encode()))
    forms = [None, *["qcow2"] * (count - 1)]
    return as_qemu_has_it(*zip(map(folder.joinpath, names), [None, *names[:-1]], forms, strict=True))
