"""Images on NBD servers, of which QEMU tells what it has written and not what the server has kept."""

import socket
from pathlib import Path

import pytest
from rig.disks import nbd_server
from rig.machines import SIZE, Content, fill, machine, make_chain, run

import qmpmerge
from qmpmerge.chain.chain import Image
from qmpmerge.images import nbd

DRIVE = ("-drive", "if=none,id=vda,file=b.qcow2", "-device", "virtio-blk-pci,drive=vda")


@pytest.mark.parametrize("shared", [10, 1])
@pytest.mark.parametrize("top", ["[2]", None])
async def test_a_base_on_a_server_is_compared_where_others_are_let_in(
    shared: int, top: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An active merge only if asked for: the guest would have to stand still."""
    monkeypatch.setattr(nbd, "SECONDS", 0.5)
    monkeypatch.chdir(tmp_path)
    (base,) = make_chain(tmp_path, ["base.raw"])
    content = Content()
    with nbd_server(tmp_path, base, shared=shared) as uri:
        for name, below, form in (("a.qcow2", uri, "raw"), ("b.qcow2", "a.qcow2", "qcow2")):
            run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", below, "-F", form, name, str(SIZE), cwd=tmp_path)
        fill([tmp_path / "a.qcow2", tmp_path / "b.qcow2"], content)
        with machine(tmp_path, *DRIVE) as vm:
            async with qmpmerge.live(vm.target) as host:
                outcome = await qmpmerge.commit(host, base="[1]", top=top)
            vm.stop()
        assert outcome.verified == (shared == 10 and top is not None)
        assert any("was not compared" in hint for hint in outcome.hints) != outcome.verified
        if top is not None:
            content.check(tmp_path / "b.qcow2")
    if top is None:
        content.check(base)


async def test_a_header_is_read_past_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd, "SECONDS", 0.5)
    _base, overlay = make_chain(tmp_path, ["base.raw", "a.qcow2"])
    with nbd_server(tmp_path, overlay, shared=1, served_as="raw") as uri:
        image = Image(uri, "qcow2", SIZE)
        header = await nbd.header(image)
        assert header is not None and (header.backing, header.backing_format) == ("base.raw", "raw")
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(tmp_path / "nbd"))
            assert other.recv(8) == b"NBDMAGIC"
            assert await nbd.header(image) is None
    assert await nbd.header(image) is None
