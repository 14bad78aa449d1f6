"""Walking a chain on disk: what headers name is looked at before it is opened."""

import json
import os
import shlex
import socket
from pathlib import Path

import pytest
from rig.command import invoke
from rig.devices import loop
from rig.headers import raw_header
from rig.machines import make_chain, run

from qmpmerge.errors import BackingLoop, Disguised, ForeignName, ImageUnreadable, NoFormat, TooDeep, UnsupportedFormat
from qmpmerge.images import walk


def header(
    path: Path, backing: str | None = None, form: str | None = "qcow2", *, data_file: bytes | None = None
) -> Path:
    path.write_bytes(
        raw_header(*(os.fsencode(name) if name else None for name in (backing, form)), data_file=data_file)
    )
    return path


def names(path: Path, *allow: Path | str) -> list[str]:
    """The chain below `path` as file names, base first."""
    return [os.path.basename(layer.file) for layer in walk.walk(str(path), allow=[str(place) for place in allow])]


def test_a_chain_is_told_base_first(tmp_path: Path) -> None:
    images = make_chain(tmp_path)
    layers = walk.walk(str(images[3]))
    assert [layer.file for layer in layers] == [str(image) for image in images]
    assert [layer.format for layer in layers] == ["raw", "qcow2", "qcow2", "qcow2"]
    assert [layer.backing for layer in layers] == [None, "base.raw", "a.qcow2", "b.qcow2"]
    assert not any(layer.encrypted or layer.is_device for layer in layers)


def test_a_single_image(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(512))
    (layer,) = walk.walk(str(tmp_path / "disk.img"))
    assert (layer.format, layer.backing) == ("raw", None)


def test_a_relative_name_starts_where_we_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_chain(tmp_path)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert names(Path("../b.qcow2")) == ["base.raw", "a.qcow2", "b.qcow2"]


# --- formats: recorded, never guessed ------------------------------------------------------------------------------------


def test_a_raw_base_that_looks_like_qcow2_is_raw(tmp_path: Path) -> None:
    """Its guest wrote that, to get at a file of the host."""
    header(tmp_path / "base.img", "/etc/passwd", "raw")
    header(tmp_path / "top.qcow2", "base.img", "raw")
    base, _top = walk.walk(str(tmp_path / "top.qcow2"))
    assert (base.format, base.backing) == ("raw", None)


def test_a_raw_active_image_that_looks_like_qcow2_leads_nowhere_else(tmp_path: Path) -> None:
    """Nothing records the active image's format, so the names in it count for as little as a stranger's."""
    (tmp_path / "vm").mkdir()
    (tmp_path / "victim.raw").write_bytes(bytes(512))
    for name in ("/etc/passwd", "../victim.raw", str(tmp_path / "victim.raw")):
        with pytest.raises(ForeignName) as refused:
            walk.walk(str(header(tmp_path / "vm" / "disk.img", name, "raw")))
        assert (refused.value.backing, refused.value.exit_code) == (name, 3)


def test_an_active_image_that_is_called_raw_and_looks_like_qcow2_is_refused(tmp_path: Path) -> None:
    """Even a name in its own folder: a merge would overwrite the neighbour."""
    (tmp_path / "neighbour.raw").write_bytes(bytes(512))
    with pytest.raises(Disguised, match="its guest may have written that"):
        walk.walk(str(header(tmp_path / "disk.raw", "neighbour.raw", "raw")))


@pytest.mark.parametrize("damage", [(8, b"\xff" * 8), (16, b"\xff" * 4)], ids=["offset", "length"])
def test_a_damaged_active_image_is_not_taken_for_raw(damage: tuple[int, bytes], tmp_path: Path) -> None:
    """A `commit` of it would say that there is nothing to merge, and exit with 0."""
    broken = bytearray(raw_header(b"base.raw", b"raw"))
    broken[damage[0] : damage[0] + len(damage[1])] = damage[1]
    (tmp_path / "top.qcow2").write_bytes(bytes(broken))
    with pytest.raises(ImageUnreadable):
        walk.walk(str(tmp_path / "top.qcow2"))


def described(path: Path, **part: object) -> str:
    file = {"driver": "file", "filename": str(path)}
    return "json:" + json.dumps({"driver": "raw", **part, "file": file})


def test_a_part_of_a_file(tmp_path: Path) -> None:
    """Followed as the path in it is: the name says no more than which part."""
    (tmp_path / "box").write_bytes(bytes(8192))
    for part in ({}, {"offset": 512}, {"offset": "4k", "size": 1024}):
        base, _top = walk.walk(str(header(tmp_path / "top.qcow2", described(tmp_path / "box", **part), "raw")))
        found = (base.slice.offset, base.slice.size) if base.slice is not None else None
        assert (base.file, base.format, found) == (
            str(tmp_path / "box"),
            "raw",
            {0: None, 1: (512, None), 2: (4096, 1024)}[len(part)],
        )


def test_a_json_name_that_says_more_is_foreign(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / "box").write_bytes(bytes(8192))
    (tmp_path / "outside").write_bytes(bytes(8192))
    box = tmp_path / "vm" / "box"
    names = [
        described(tmp_path / "outside", offset=512),
        described(Path("box"), offset=512),
        described(Path(f"{box}\0"), offset=512),
        described(Path(f"{box}\ud800"), offset=512),
        described(box, offset=-1),
        described(box, offset=1 << 70),
        described(box, offset=512, probed=True),
        described(box).replace('"raw"', '"qcow2"'),
        described(box, offset=512).replace('"raw"', '"qcow2"'),
        described(box).replace('"filename"', '"locking": "off", "filename"'),
        described(box).replace('"file"', '"nbd"'),
        f'json:{{"driver":"raw","file":{described(box).removeprefix("json:")},"offset":1,"x":[{"[" * 5000}',
        'json:{"driver":"raw","file":{"driver":"raw","file":{"driver":"raw","file":{}}}}',
        "json:[]",
    ]
    for name in names:
        with pytest.raises(ForeignName):
            walk.walk(str(header(tmp_path / "vm" / "top.qcow2", name[:1000], "raw")))


def test_a_missing_format(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(512))
    with pytest.raises(NoFormat, match=r"does not record the format of its backing file base\.raw") as refused:
        walk.walk(str(header(tmp_path / "top.qcow2", "base.raw", None)))
    assert "qemu-img rebase -u" in refused.value.hint


def test_a_backing_file_that_is_not_what_the_header_says(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(512))
    with pytest.raises(ImageUnreadable, match="said to be qcow2"):
        walk.walk(str(header(tmp_path / "top.qcow2", "base", "qcow2")))


@pytest.mark.parametrize("form", ["vmdk", "file", "nbd", "", "\x1b[31m"])
def test_other_formats(form: str, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(512))
    top = header(tmp_path / "top.qcow2", "base", form)
    with pytest.raises((UnsupportedFormat, NoFormat)):
        walk.walk(str(top))


@pytest.mark.parametrize("form", ["qed", "vmdk"])
def test_an_active_image_of_another_format_is_not_taken_for_raw(form: str, tmp_path: Path) -> None:
    """It has layers below it; a `commit` of it would say that there is nothing to merge, and exit with 0."""
    base, top = tmp_path / f"base.{form}", tmp_path / f"its top.{form}"
    run("qemu-img", "create", "-qf", form, base, "1M")
    run("qemu-io", "-f", form, "-c", "write -P 7 0 64k", base)
    run("qemu-img", "create", "-qf", form, "-b", base, "-F", form, top)
    said = invoke("commit", str(top), "--json")
    assert (said.code, said.document["error"]["name"]) == (3, "unsupported-format")
    assert said.document["error"]["facts"]["format"] == form
    run(*shlex.split(said.document["error"]["hint"].split("`")[1]))
    assert "4096/4096" in run("qemu-io", "-c", "read -P 7 0 4k", f"{top}.qcow2")
    assert invoke("commit", str(top), "--format", "raw").code == 0  # the user knows better: a guest has written that


def test_an_image_that_is_called_raw_is_raw_whatever_it_begins_like(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"QED\0".ljust(512, b"\0"))
    assert [layer.format for layer in walk.walk(str(tmp_path / "disk.raw"))] == ["raw"]


def test_the_format_that_the_user_states_counts(tmp_path: Path) -> None:
    make_chain(tmp_path)
    (tmp_path / "c.qcow2").rename(tmp_path / "c.raw")
    with pytest.raises(Disguised) as refused:
        walk.walk(str(tmp_path / "c.raw"))
    assert "--format qcow2" in refused.value.hint
    assert len(walk.walk(str(tmp_path / "c.raw"), form="qcow2")) == 4
    assert len(walk.walk(str(tmp_path / "c.raw"), form="raw")) == 1
    with pytest.raises(ImageUnreadable, match="said to be qcow2"):
        walk.walk(str(tmp_path / "base.raw"), form="qcow2")


def test_file_and_a_path_is_the_path(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / "base.raw").write_bytes(bytes(512))
    (tmp_path / "outside.raw").write_bytes(bytes(512))
    assert names(header(tmp_path / "vm" / "top.qcow2", f"file:{tmp_path}/vm/base.raw", "raw")) == [
        "base.raw",
        "top.qcow2",
    ]
    outside = header(tmp_path / "vm" / "top.qcow2", f"file:{tmp_path}/outside.raw", "raw")
    with pytest.raises(ForeignName, match="leads out of the image's folder"):
        walk.walk(str(outside))
    assert names(outside, tmp_path / "outside.raw") == ["outside.raw", "top.qcow2"]
    with pytest.raises(ForeignName):  # from QEMU's own folder, whichever that was
        walk.walk(str(header(tmp_path / "vm" / "top.qcow2", "file:base.raw", "raw")))


def test_a_device_must_be_named_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    with loop(tmp_path / "disk") as device:
        (tmp_path / "link.raw").symlink_to(device)
        (tmp_path / "vm").mkdir()
        top = header(tmp_path / "vm" / "top.qcow2", device, "raw")
        for allowed in ([], [tmp_path], ["/dev/mapper"]):
            with pytest.raises(ForeignName, match="a device, which you have not named"):
                names(top, *allowed)
        for allowed in ([device], ["/dev"], [tmp_path / "link.raw"]):
            assert names(top, *allowed) == [os.path.basename(device), "top.qcow2"]
        smuggled = header(tmp_path / "vm" / "top.qcow2", "../link.raw", "raw")
        with pytest.raises(ForeignName):  # whoever may write to the folder could have made that link
            names(smuggled, tmp_path)


def test_encrypted_images_and_data_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "top.data").write_bytes(bytes(512))
    (tmp_path / "base.luks").write_bytes(bytes(512))
    (tmp_path / "aes.qcow2").write_bytes(raw_header(b"base.luks", b"luks", crypt=1))
    header(tmp_path / "top.qcow2", "aes.qcow2", data_file=b"top.data")
    layers = walk.walk(str(tmp_path / "top.qcow2"))
    assert [layer.encrypted for layer in layers] == [True, True, False]
    assert [layer.data_file for layer in layers] == [None, None, str(tmp_path / "top.data")]


# --- names that are not followed -----------------------------------------------------------------------------------------

FOREIGN = [
    "/etc/passwd",
    "/dev/zero",
    "/dev/null",
    "/proc/self/mem",
    "/etc",
    "..",
    ".",
    "/",
    "nbd://127.0.0.1:1/x",
    "nbd+unix:///?socket=/tmp/x",
    "http://127.0.0.1:1/x",
    "rbd:pool/image",
    "ssh://localhost/etc/passwd",
    'json:{"driver":"file","filename":"/etc/passwd"}',
    "file:base.raw",
    "fat:rw:/etc",
    "host_device:/dev/zero",
    "blkdebug::base.raw",
    "a:b.raw",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_backing_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(512))
    (tmp_path / "a:b.raw").write_bytes(bytes(512))
    for folder in ("vm", "."):  # as active image, and below it
        (tmp_path / folder).mkdir(exist_ok=True)
    middle = header(tmp_path / "vm" / "middle.qcow2", name, "raw")
    for image in (middle, header(tmp_path / "vm" / "top.qcow2", "middle.qcow2")):
        with pytest.raises(ForeignName) as refused:
            walk.walk(str(image))
        assert refused.value.image == str(middle)
        assert refused.value.backing == name
        assert "--allow" in refused.value.hint


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_data_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    with pytest.raises(ForeignName):
        walk.walk(str(header(tmp_path / "vm" / "top.qcow2", data_file=name.encode())))


@pytest.mark.parametrize("name", ["base.raw\0", "\0", "a\0b"], ids=ascii)
def test_a_name_with_a_nul(name: str, tmp_path: Path) -> None:
    with pytest.raises((ForeignName, ImageUnreadable)):
        walk.walk(str(header(tmp_path / "top.qcow2", name, "raw")))


def test_a_name_too_long_for_the_kernel(tmp_path: Path) -> None:
    with pytest.raises(ImageUnreadable, match="too long"):
        walk.walk(str(header(tmp_path / "top.qcow2", "x" * 1000, "raw")))


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for allowed in ([], [tmp_path / "fifo"]):
        with pytest.raises(ForeignName, match="does not lead to a regular file"):
            names(header(tmp_path / "top.qcow2", "fifo", "raw"), *allowed)
        with pytest.raises(ForeignName, match="does not lead to a regular file"):
            names(header(tmp_path / "data.qcow2", data_file=b"fifo"), *allowed)


def test_a_character_device_is_refused_even_where_it_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ForeignName, match="does not lead to a regular file"):
        names(header(tmp_path / "top.qcow2", "/dev/zero", "raw"), "/dev/zero", "/dev", "/")


def test_a_symlink_does_not_smuggle(tmp_path: Path) -> None:
    """A name in the image's folder that leads out of it."""
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / "base.raw").symlink_to("/etc/passwd")
    with pytest.raises(ForeignName, match="leads out of the image's folder"):
        names(header(tmp_path / "vm" / "top.qcow2", "base.raw", "raw"))


def test_a_folder_whose_name_begins_like_the_images_is_another(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm-secret").mkdir()
    (tmp_path / "vm-secret" / "base.raw").write_bytes(bytes(512))
    with pytest.raises(ForeignName):
        names(header(tmp_path / "vm" / "top.qcow2", "../vm-secret/base.raw", "raw"))


def test_a_folder_below_the_images_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "base.raw").write_bytes(bytes(512))
    assert names(header(tmp_path / "top.qcow2", "below/base.raw", "raw")) == ["base.raw", "top.qcow2"]


def test_what_the_user_has_named_is_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vm").mkdir()
    (tmp_path / "golden").mkdir()
    golden = tmp_path / "golden" / "base.raw"
    golden.write_bytes(bytes(512))
    (tmp_path / "link").symlink_to("golden")
    monkeypatch.chdir(tmp_path)
    top = header(tmp_path / "vm" / "top.qcow2", str(golden), "raw")
    for allowed in (golden, golden.parent, tmp_path, tmp_path / "link", "golden", "link/base.raw", "/"):
        assert names(top, allowed) == ["base.raw", "top.qcow2"]
    for allowed in (golden.parent / "other.raw", tmp_path / "vm", "gold"):
        with pytest.raises(ForeignName):
            names(top, allowed)


def test_no_connection_is_made(tmp_path: Path) -> None:
    """Neither for a backing file nor for a data file, by any command."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        url = f"nbd://127.0.0.1:{listener.getsockname()[1]}/disk"
        backing = header(tmp_path / "backing.qcow2", url, "raw")
        data = header(tmp_path / "data.qcow2", data_file=url.encode())
        for image in (backing, data):
            for words in (["chain"], ["disks"], ["commit"], ["snapshot", "x=new.qcow2"]):
                run = invoke(words[0], str(image), *words[1:], cwd=tmp_path)
                assert (run.code, "is not followed" in run.err) == (3, True)
        with pytest.raises(BlockingIOError):
            listener.accept()


# --- chains that do not end --------------------------------------------------------------------------------------------------


def test_loops(tmp_path: Path) -> None:
    a = header(tmp_path / "a.qcow2", "b.qcow2")
    header(tmp_path / "b.qcow2", "a.qcow2")
    own = header(tmp_path / "own.qcow2", "./own.qcow2")
    top = header(tmp_path / "top.qcow2", "a.qcow2")
    for image in (a, own, top):
        with pytest.raises(BackingLoop, match="the chain is a loop") as refused:
            walk.walk(str(image))
        assert refused.value.exit_code == 3


def test_a_loop_through_a_hard_link_and_a_symlink(tmp_path: Path) -> None:
    a = header(tmp_path / "a.qcow2", "hard.qcow2")
    os.link(a, tmp_path / "hard.qcow2")
    b = header(tmp_path / "b.qcow2", "soft.qcow2")
    (tmp_path / "soft.qcow2").symlink_to("b.qcow2")
    for image in (a, b):
        with pytest.raises(BackingLoop):
            walk.walk(str(image))


def test_a_thousand_images_are_too_many(tmp_path: Path) -> None:
    header(tmp_path / "0.qcow2")
    for number in range(1, 1000):
        header(tmp_path / f"{number}.qcow2", f"{number - 1}.qcow2")
    with pytest.raises(TooDeep) as refused:
        walk.walk(str(tmp_path / "999.qcow2"))
    assert refused.value.limit == walk.DEEPEST
    assert len(names(tmp_path / f"{walk.DEEPEST - 1}.qcow2")) == walk.DEEPEST


# --- names on disk -----------------------------------------------------------------------------------------------------------


def test_files_that_are_not_there_or_not_ours(tmp_path: Path) -> None:
    with pytest.raises(ImageUnreadable, match="No such file"):
        walk.walk(str(tmp_path / "none.qcow2"))
    top = header(tmp_path / "top.qcow2", "none.raw", "raw")
    with pytest.raises(ImageUnreadable, match=f"No such file or directory, named by {top}"):
        walk.walk(str(top))
    (tmp_path / "base.raw").symlink_to("base.raw")
    with pytest.raises(ImageUnreadable):
        walk.walk(str(header(top, "base.raw", "raw")))


def test_relative_names_start_at_the_folder_of_the_name_that_was_given(tmp_path: Path) -> None:
    """As in QEMU: a symlinked image looks beside the link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").mkdir()
    (tmp_path / "real" / "base.raw").write_bytes(bytes(512))
    (tmp_path / "link" / "base.raw").write_bytes(bytes(1024))
    header(tmp_path / "real" / "top.qcow2", "base.raw", "raw")
    (tmp_path / "link" / "top.qcow2").symlink_to("../real/top.qcow2")
    for folder in ("real", "link"):
        assert walk.walk(str(tmp_path / folder / "top.qcow2"))[0].file == str(tmp_path / folder / "base.raw")


def test_dots_behind_a_symlinked_folder_lead_where_the_kernel_says(tmp_path: Path) -> None:
    """/vm is a link to /data/vm: there ../golden is /data/golden, for QEMU too."""
    for folder in ("data/vm", "data/golden", "golden"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "base.raw").write_bytes(bytes(512))
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "../golden/base.raw", "-F", "raw", "top.qcow2", "512",
        cwd=tmp_path / "data" / "vm")  # fmt: skip
    (tmp_path / "vm").symlink_to("data/vm")
    base, _top = walk.walk(str(tmp_path / "vm" / "top.qcow2"), allow=[str(tmp_path)])
    assert base.file == str(tmp_path / "vm" / ".." / "golden" / "base.raw")
    assert os.path.samefile(base.file, tmp_path / "data" / "golden" / "base.raw")


def test_dots_that_lead_back_are_left_out(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    (tmp_path / "two" / "base.raw").write_bytes(bytes(512))
    header(tmp_path / "one" / "top.qcow2", "../one/../two/base.raw", "raw")
    base, _top = walk.walk(str(tmp_path / "one" / "top.qcow2"), allow=[str(tmp_path)])
    assert base.file == str(tmp_path / "two" / "base.raw")
