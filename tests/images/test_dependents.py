"""Who else is built on an image: found in the folders of the chain, live and offline."""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from rig.command import invoke
from rig.devices import mounted
from rig.disks import drive
from rig.headers import raw_header
from rig.machines import Content, fill, make_chain, run
from rig.nobody import as_nobody, public

import qmpmerge
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.errors import Dependents, NotSeen
from qmpmerge.images import backing_names, dependents


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    (tmp_path / "vm").mkdir()
    return make_chain(tmp_path / "vm")


def sibling(path: Path, backing: Path | str, form: str = "qcow2") -> Path:
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", str(backing), "-F", form, path, "8M")
    return path


def chain_of(images: list[Path]) -> Chain:
    return Chain(tuple(Image(str(path), path.suffix[1:], 0, inode=inode(path)) for path in images))


def inode(path: Path) -> tuple[int, int]:
    return path.stat().st_dev, path.stat().st_ino


def found(images: list[Path], search: tuple[str, ...] = ()) -> dict[str, str]:
    """What is built on the middle images: name of the dependent to name of the image."""
    return {os.path.basename(one.file): os.path.basename(one.image) for one in look(images, *search).dependents}


# --- what is looked at ---------------------------------------------------------------------------------------------------


def test_the_chain_itself_is_not_built_on_itself(images: list[Path]) -> None:
    assert found(images) == {}


def test_all_are_found_however_they_name_it(images: list[Path]) -> None:
    folder = images[0].parent
    sibling(folder / "relative.qcow2", "a.qcow2")
    sibling(folder / "absolute.qcow2", images[1])
    sibling(folder / "prefixed.qcow2", f"file:{images[2]}")
    sibling(folder / "roundabout.qcow2", f"../vm/./{images[2].name}")
    (folder / "no-suffix").write_bytes(raw_header(b"b.qcow2", b"qcow2"))
    (folder / "link").symlink_to("a.qcow2")
    sibling(folder / "by-link.qcow2", "link")
    assert found(images) == {
        "relative.qcow2": "a.qcow2",
        "absolute.qcow2": "a.qcow2",
        "prefixed.qcow2": "b.qcow2",
        "roundabout.qcow2": "b.qcow2",
        "no-suffix": "b.qcow2",
        "by-link.qcow2": "a.qcow2",
    }


def test_a_json_name_is_understood(images: list[Path]) -> None:
    name = f'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{images[1]}"}}}}'
    (images[0].parent / "json.qcow2").write_bytes(raw_header(name.encode(), b"qcow2"))
    assert found(images) == {"json.qcow2": "a.qcow2"}


NAMES = {
    "dotted": 'json:{{"driver":"qcow2","file.driver":"file","file.filename":"{path}"}}',
    "probed": 'json:{{"file.filename":"{path}"}}',
    "escaped": 'json:{{"driver":"qcow2","file.filename":"{folder}/\\u0061.qcow2"}}',
    "debugged": "blkdebug::{path}",
    "debugged-twice": "blkdebug::blkdebug::{path}",
    "debugged-json": 'json:{{"driver":"qcow2","file":{{"driver":"blkdebug","image.filename":"{path}"}}}}',
    "debugged-inside": 'json:{{"driver":"qcow2","file":{{"driver":"blkdebug","x-image":"{path}"}}}}',
}


@pytest.mark.parametrize("name", NAMES)
def test_all_that_qemu_follows_is_understood(name: str, images: list[Path]) -> None:
    """However it is spelled: QEMU itself reads the image through it."""
    fill(images[:2], Content())
    written = NAMES[name].format(path=images[1], folder=images[1].parent)
    over = sibling(images[0].parent / "over.qcow2", written)
    assert run("qemu-img", "compare", over, images[1]) == "Images are identical.\n"
    assert (found(images), look(images).doubts) == ({"over.qcow2": "a.qcow2"}, {})


@pytest.mark.parametrize(
    "name",
    [
        'json:{{"driver":"qcow2","file.driver":"throttle","file.file.filename":"{path}"}}',
        "host_device:{path}",
        "blkverify:{path}:/nowhere",
        "blkverify:/nowhere:{path}",
        'json:{{"driver":"quorum","children.0.file.filename":"/nowhere","children.1.file.filename":"{path}"}}',
        'json:{{"driver":"quorum","children":[{{"file":{{"filename":"{path}"}}}}]}}',
        'json:{{"driver":"qcow2","backing":{{"file.filename":"{path}"}},"file.filename":"/nowhere"}}',
    ],
)
def test_what_qemu_follows_elsewhere_is_understood(name: str, images: list[Path]) -> None:
    """Where it takes a device or an object that is not here."""
    written = name.format(path=images[1]).encode()
    (images[0].parent / "over.qcow2").write_bytes(raw_header(written, b"qcow2"))
    assert found(images) == {"over.qcow2": "a.qcow2"}


RIDDLES = [
    "json:{{'driver':'qcow2','file.filename':'{path}'}}",
    'json:{{"driver":"qcow2","file.name":"{path}"}}',
    "json:{path}",
    "newer:{path}",
]


@pytest.mark.parametrize("name", RIDDLES)
async def test_what_cannot_be_understood_is_not_passed(name: str, images: list[Path], content: Content) -> None:
    """QEMU follows the first of them: it takes JSON that nobody else takes."""
    over = images[0].parent / "over.qcow2"
    over.write_bytes(raw_header(name.format(path=images[1]).encode(), b"qcow2"))
    async with qmpmerge.offline(images[3]) as target:
        with pytest.raises(NotSeen) as refused:
            await qmpmerge.commit(target)
        assert refused.value.unseen == [str(over)]
        outcome = await qmpmerge.commit(target, force=["not-seen"])
    assert {one.name: one.result for one in outcome.checks}["dependents"] == "not checked"


@pytest.mark.parametrize(
    "name",
    [
        "nbd://nowhere/a.qcow2",
        "nbd:localhost:10809",
        "rbd:pool/a.qcow2",
        'json:{"driver":"qcow2","file":{"driver":"nbd","server":{"type":"inet","host":"nowhere","port":"1"}}}',
        'json:{"driver":"raw","file.driver":"https","file.url":"https://nowhere/a"}',
    ],
)
def test_what_lies_on_the_network_is_no_riddle(name: str, images: list[Path]) -> None:
    (images[0].parent / "over.qcow2").write_bytes(raw_header(name.encode(), b"qcow2"))
    looked = look(images)
    assert (looked.dependents, looked.doubts, looked.unseen) == ((), {}, ())


def test_those_on_other_images_do_not_count(images: list[Path]) -> None:
    folder = images[0].parent
    sibling(folder / "on-active.qcow2", "c.qcow2")
    shutil.copy(images[1], folder / "copy.qcow2")
    sibling(folder / "on-copy.qcow2", "copy.qcow2")
    sibling(folder / "url.qcow2", "nbd://nowhere/a.qcow2")
    sibling(folder / "gone.qcow2", "not-there.qcow2")
    assert found(images) == {}


def test_hard_links_and_symlinks_of_images_are_the_images(images: list[Path], tmp_path: Path) -> None:
    """Also of the chain's own images: an image is its inode."""
    folder = images[0].parent
    os.link(images[3], folder / "hard-active.qcow2")
    (folder / "soft-active.qcow2").symlink_to(images[3])
    os.link(images[1], tmp_path / "hard-a.qcow2")
    sibling(folder / "on-hard.qcow2", tmp_path / "hard-a.qcow2")
    assert found(images) == {"on-hard.qcow2": "a.qcow2"}


def test_one_file_under_two_names_is_told_once(images: list[Path]) -> None:
    folder = images[0].parent
    one = sibling(folder / "one.qcow2", "a.qcow2")
    (folder / "other.qcow2").symlink_to(one)
    assert len(found(images)) == 1


def test_a_symlinked_dependent_elsewhere(images: list[Path], tmp_path: Path) -> None:
    sibling(tmp_path / "elsewhere.qcow2", images[1])
    (images[0].parent / "linked.qcow2").symlink_to(tmp_path / "elsewhere.qcow2")
    assert found(images) == {"linked.qcow2": "a.qcow2"}


def test_a_symlinked_dependent_with_a_relative_name(images: list[Path], tmp_path: Path) -> None:
    """QEMU looks from the folder of the name that it was given."""
    (tmp_path / "store").mkdir()
    sibling(tmp_path / "store" / "real.qcow2", "a.qcow2")
    link = images[0].parent / "linked.qcow2"
    link.symlink_to(tmp_path / "store" / "real.qcow2")
    run("qemu-img", "info", "--backing-chain", link)
    assert found(images) == {"linked.qcow2": "a.qcow2"}


def test_a_chain_of_symlinks_is_looked_for_in_both_folders(images: list[Path], tmp_path: Path) -> None:
    shop = tmp_path / "shop"
    shop.mkdir()
    links = [shop / image.name for image in images]
    for link, image in zip(links, images, strict=True):
        link.symlink_to(image)
    sibling(images[0].parent / "at-home.qcow2", "a.qcow2")
    sibling(shop / "in-the-shop.qcow2", "a.qcow2")
    assert found(links) == {"at-home.qcow2": "a.qcow2", "in-the-shop.qcow2": "a.qcow2"}


def test_other_folders_are_looked_through_where_they_are_named(images: list[Path], tmp_path: Path) -> None:
    """With all that is below, the chain's own folder among it."""
    other, below = tmp_path / "other", tmp_path / "other" / "below" / "it"
    below.mkdir(parents=True)
    (images[0].parent / "own").mkdir()
    sibling(images[0].parent / "own" / "near.qcow2", images[1])
    sibling(other / "far.qcow2", images[1])
    sibling(below / "farther.qcow2", images[1])
    assert found(images) == {}
    assert found(images, (str(below),)) == {"farther.qcow2": "a.qcow2"}
    far = {"far.qcow2": "a.qcow2", "farther.qcow2": "a.qcow2"}
    assert found(images, (str(other),)) == far
    assert found(images, (str(tmp_path), str(below))) == far | {"near.qcow2": "a.qcow2"}
    looked = look(images, tmp_path, tmp_path)
    assert looked.told == f"7 files in 6 folders: {tmp_path}/vm, all below {tmp_path}"
    assert (looked.unseen, looked.covers(str(below)), looked.covers("/")) == ((), True, False)


def test_what_is_told_is_what_somebody_can_count(images: list[Path], tmp_path: Path) -> None:
    for name in (".a.qcow2.qmpmerge-lock", ".c.qcow2.qmpmerge-record", ".c.qcow2.qmpmerge-record.new"):
        (images[0].parent / name).write_text("")
    there = len([name for name in images[0].parent.iterdir() if not name.name.startswith(".")])
    assert look(images).told == f"{there} files in 1 folder: {images[0].parent}"


def look(images: list[Path], *search: Path | str) -> dependents.Look:
    chain = chain_of(images)
    return dependents.look_now(chain.images[1:3], chain, [str(folder) for folder in search])


def test_what_is_not_there_was_not_looked_at(images: list[Path], tmp_path: Path) -> None:
    looked = look(images, tmp_path / "not-there")
    assert looked.unseen == (f"{tmp_path}/not-there cannot be listed (No such file or directory)",)
    assert looked.covers(str(images[0].parent)) is False
    assert invoke("commit", str(images[3]), "--search", str(tmp_path / "not-there")).code == 2


def test_what_may_not_be_looked_at_is_said() -> None:
    with public() as folder:
        images = make_chain(folder)
        for number in range(3):
            (folder / f"closed{number}").mkdir(0o700)
            sibling(folder / f"secret{number}.qcow2", "a.qcow2").chmod(0o600)
        with as_nobody():
            looked = look(images, folder)
        assert looked.dependents == ()
        denied = "(Permission denied)"
        first, second = sorted(looked.unseen, key=lambda reason: "listed" in reason)
        assert re.fullmatch(rf"{folder}/secret\d.qcow2 and 2 more cannot be read {re.escape(denied)}", first)
        assert re.fullmatch(rf"{folder}/closed\d and 2 more cannot be listed {re.escape(denied)}", second)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_another_filesystem_is_looked_at_where_it_is_named(kind: str, images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "store").mkdir()
    how = ["-t", "tmpfs", "none"] if kind == "tmpfs" else ["--bind", str(tmp_path / "store")]
    with mounted(tmp_path / "other" / "m m", *how) as m:
        sibling(m / "far.qcow2", images[1])
        looked = look(images, tmp_path / "other")
        assert looked.dependents == ()
        assert looked.unseen == (f"{m} is another filesystem: name it by `--search` too",)
        assert (looked.covers(str(m)), looked.covers(str(m.parent))) == (False, True)
        looked = look(images, tmp_path / "other", m)
        assert ([one.file for one in looked.dependents], looked.unseen) == ([f"{m}/far.qcow2"], ())


def test_a_link_to_a_folder_is_not_followed_and_that_is_said(images: list[Path], tmp_path: Path) -> None:
    """It could lead anywhere; those that lead to what was looked at are no matter."""
    other, store = tmp_path / "other", tmp_path / "store"
    other.mkdir()
    store.mkdir()
    sibling(store / "far.qcow2", images[1])
    (other / "link").symlink_to(store)
    (other / "self").symlink_to(".")
    looked = look(images, other)
    assert looked.unseen == (f"{other}/link is a link to another folder: name that by `--search` too",)
    looked = look(images, other, store)
    assert ([one.file for one in looked.dependents], looked.unseen) == ([f"{store}/far.qcow2"], ())
    assert [one.file for one in look(images, other / "link").dependents] == [f"{store}/far.qcow2"]


@pytest.mark.parametrize(("limit", "value"), [("MOST", 3), ("LONGEST", 0.0)])
def test_a_search_has_an_end(
    limit: str, value: float, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chain's own folder is looked through whatever it holds."""
    (tmp_path / "other").mkdir()
    sibling(tmp_path / "other" / "far.qcow2", images[1])
    sibling(images[0].parent / "near.qcow2", images[1])
    monkeypatch.setattr(dependents, limit, value)
    looked = look(images, tmp_path)
    assert [one.file for one in looked.dependents] == [f"{images[0].parent}/near.qcow2"]
    assert (looked.is_cut, looked.covers(str(images[0].parent)), len(looked.unseen)) == (True, False, 1)
    assert looked.unseen[0].startswith(f"{tmp_path} was not looked through to its end: ")


def test_what_cannot_be_read_is_passed_over_and_said(images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = images[0].parent
    os.mkfifo(folder / "fifo.qcow2")
    (folder / "dangling.qcow2").symlink_to("nowhere")
    (folder / "folder.qcow2").mkdir()
    (folder / "broken.qcow2").write_bytes(b"QFI\xfb" + b"\xff" * 500)
    (folder / "short.qcow2").write_bytes(b"QFI\xfb")
    sibling(folder / "secret.qcow2", "a.qcow2")
    sibling(folder / "seen.qcow2", "a.qcow2")
    really = backing_names.read

    def read(path: str, *, device: bool = False) -> str | None:
        if path.endswith("secret.qcow2"):
            raise PermissionError(13, "Permission denied")  # root, as whom tests may run, is never refused
        return really(path, device=device)

    monkeypatch.setattr(backing_names, "read", read)
    assert found(images) == {"seen.qcow2": "a.qcow2"}
    assert look(images).unseen == (f"{folder}/secret.qcow2 cannot be read (Permission denied)",)


def test_a_symlink_that_leads_to_itself_is_passed_over(images: list[Path]) -> None:
    sibling(images[0].parent / "seen.qcow2", "a.qcow2")
    (images[0].parent / "loop.qcow2").symlink_to("loop.qcow2")
    assert found(images) == {"seen.qcow2": "a.qcow2"}


def test_a_name_with_a_nul_is_passed_over(images: list[Path]) -> None:
    (images[0].parent / "nul.qcow2").write_bytes(raw_header(b"a.qc\0ow2", b"qcow2"))
    assert found(images) == {}


def test_a_thousand_images(images: list[Path]) -> None:
    folder = images[0].parent
    for number in range(1000):
        backing = b"a.qcow2" if number % 100 == 0 else b"elsewhere.qcow2"
        (folder / f"{number}.qcow2").write_bytes(raw_header(backing, b"qcow2"))
    assert len(found(images)) == 10


# --- what a merge makes of them -------------------------------------------------------------------------------------------


@pytest.fixture
def siblings(images: list[Path]) -> list[str]:
    """Three that are built on images that the merge takes away."""
    folder = images[0].parent
    names = {"one.qcow2": "a.qcow2", "two.qcow2": "a.qcow2", "three.qcow2": "b.qcow2"}
    return sorted(str(sibling(folder / name, backing)) for name, backing in names.items())


async def test_all_are_named_offline(images: list[Path], siblings: list[str], content: Content) -> None:
    for top in ("[3]", None):
        async with qmpmerge.offline(images[3]) as target:
            with pytest.raises(Dependents) as refused:
                await qmpmerge.commit(target, top=top)
        assert sorted(refused.value.dependents) == siblings
        assert sorted(refused.value.images) == [str(images[1]), str(images[2])]
        assert all(name in str(refused.value) for name in siblings)
    content.check(images[3])


async def test_all_are_named_live(images: list[Path], siblings: list[str], content: Content, tmp_path: Path) -> None:
    with drive(tmp_path, images, content) as setup:
        async with qmpmerge.live(setup.machine.target) as target:
            with pytest.raises(Dependents) as refused:
                await qmpmerge.commit(target, top="[3]")
            assert sorted(refused.value.dependents) == siblings
            outcome = await qmpmerge.commit(target, top="[3]", force=["dependents"])
        assert outcome.verdict == "merged"
        setup.check()


def test_the_command_line_refuses_searches_and_is_forced(
    images: list[Path], siblings: list[str], content: Content, tmp_path: Path
) -> None:
    refused = invoke("commit", str(images[3]), "--top", "[3]", "--json")
    assert (refused.code, refused.document["error"]["name"]) == (3, "dependents")
    assert sorted(refused.document["error"]["facts"]["dependents"]) == siblings
    (tmp_path / "other").mkdir()
    far = tmp_path / "other" / "far.qcow2"
    for file in siblings:
        os.unlink(file)
    sibling(far, images[2])
    found = invoke("commit", str(images[3]), "--top", "[3]", "--search", str(far.parent), "--dry-run")
    assert (found.code, str(far) in found.err) == (3, True)
    forced = ("--search", str(far.parent), "--force", "dependents")
    assert invoke("commit", str(images[3]), "--top", "[3]", *forced).code == 0
    content.check(images[3])


async def test_dependents_of_images_outside_the_range_do_not_matter(images: list[Path], content: Content) -> None:
    sibling(images[0].parent / "on-a.qcow2", "a.qcow2")
    async with qmpmerge.offline(images[3]) as target:
        with pytest.raises(Dependents):
            await qmpmerge.commit(target, base="[1]", top="[2]")
    sibling(images[0].parent / "on-a.qcow2", "elsewhere.qcow2")
    async with qmpmerge.offline(images[3]) as target:
        assert (await qmpmerge.commit(target, base="[1]", top="[2]")).verdict == "merged"
    content.check(images[3])


async def test_an_image_that_is_built_on_the_base_is_protected(
    images: list[Path], content: Content, tmp_path: Path
) -> None:
    """What it shows through to would be overwritten: DESIGN.md, `dependents`."""
    other = sibling(images[0].parent / "other.qcow2", "base.raw", "raw")
    before = view(other, tmp_path)
    with pytest.raises(Dependents) as refused:
        async with qmpmerge.offline(images[3]) as target:
            await qmpmerge.commit(target)
    assert refused.value.dependents == [str(other)]
    assert view(other, tmp_path) == before


async def test_what_an_earlier_merge_has_stashed_is_no_obstacle(images: list[Path], content: Content) -> None:
    async with qmpmerge.offline(images[3]) as target:
        await qmpmerge.commit(target, top="[3]")
    async with qmpmerge.offline(images[3]) as target:
        assert (await qmpmerge.commit(target)).verdict == "pivoted"
    content.check(images[0])


def view(image: Path, folder: Path) -> bytes:
    """What the image shows."""
    target = folder / "view"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, target)
    data = target.read_bytes()
    os.unlink(target)
    return data


# --- overlays in other folders --------------------------------------------------------------------------------------------


@pytest.fixture
def far(images: list[Path], content: Content, tmp_path: Path) -> Path:
    """The overlay that `snapshot` has put on a VM's active image from another folder; the VM is off."""
    far = tmp_path / "far" / "d.qcow2"
    far.parent.mkdir()
    with drive(tmp_path, images, content) as setup:
        invoke("snapshot", setup.machine.target, f"{setup.disk}={far}")
        setup.moved(str(far))
        setup.write(9, 0, 65536)
    return far


@pytest.mark.parametrize("top", [None, "[4]"])
async def test_what_a_snapshot_has_put_elsewhere_is_found(
    top: str | None, images: list[Path], far: Path, content: Content
) -> None:
    async with qmpmerge.offline(images[3]) as target:
        with pytest.raises(Dependents) as refused:
            await qmpmerge.commit(target, top=top)
    assert (refused.value.dependents, refused.value.images) == ([str(far)], [str(images[3])])
    content.check(far)


async def test_the_overlay_itself_is_merged_as_ever(images: list[Path], far: Path, content: Content) -> None:
    """It is of the chain, also under another name than the note's."""
    other = far.rename(far.with_name("e.qcow2"))
    async with qmpmerge.offline(other, allow=[images[0].parent]) as target:
        outcome = await qmpmerge.commit(target, base="[4]")
    assert outcome.verdict == "pivoted"
    content.check(images[3])


async def test_a_note_that_leads_nowhere_is_a_doubt(images: list[Path], far: Path) -> None:
    far.rename(far.with_name("e.qcow2"))
    async with qmpmerge.offline(images[3]) as target:
        with pytest.raises(NotSeen) as refused:
            await qmpmerge.commit(target)
        (note,) = refused.value.unseen
        assert f"{far} is not there" in refused.value.reason
        run(*shlex.split((refused.value.hint or "").split("`")[1]))
        assert not os.path.lexists(note)
        assert (await qmpmerge.commit(target)).verdict == "pivoted"


async def test_a_note_that_others_may_have_written_is_a_doubt(images: list[Path], far: Path) -> None:
    (note,) = images[0].parent.glob(".*.qmpmerge-overlay")
    note.chmod(0o666)
    async with qmpmerge.offline(images[3]) as target:
        with pytest.raises(NotSeen, match="others than its owner"):
            await qmpmerge.commit(target)
