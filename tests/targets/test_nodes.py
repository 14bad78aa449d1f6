"""
The names by which the daemon opens images: those of the headers, so that QEMU does not tell each image by a ``json:`` name with
all in it that lies below; whatever they are, they mean the files that were walked.
"""

import contextlib
import itertools
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from rig.disks import end, remove
from rig.machines import SIZE, Content, fill, run
from speed.images import empty_chain

import qmpmerge
from qmpmerge.errors import NotSeen, NotWritable, Replaced, SessionLost
from qmpmerge.images.walk import Layer
from qmpmerge.targets import nodes

FORMS = ("raw", "qcow2", "qcow2", "qcow2")


def stacked(*images: tuple[Path, str]) -> list[Path]:
    """A chain, base first: of each image its path and the name that the header above has for it."""
    files = [file for file, _name in images]
    for number, (file, form) in enumerate(zip(files, FORMS, strict=True)):
        file.parent.mkdir(exist_ok=True)
        below = ["-u", "-b", images[number - 1][1], "-F", FORMS[number - 1]] if number else []
        run("qemu-img", "create", "-q", "-f", form, *below, file, str(SIZE))
    return files


def relative(vm: Path) -> list[Path]:
    return stacked(*((vm / name, name) for name in ("0.raw", "1.qcow2", "2.qcow2", "3.qcow2")))


def absolute(vm: Path) -> list[Path]:
    return stacked(*((vm / name, f"{vm}/{name}") for name in ("0.raw", "1.qcow2", "2.qcow2", "3.qcow2")))


def with_colons(vm: Path) -> list[Path]:
    return stacked(*((vm / f"nbd:a:{name}", f"./nbd:a:{name}") for name in ("0", "1", "2", "3")))


def mixed(vm: Path) -> list[Path]:
    """As after some merges by hand."""
    names = ("0.raw", f"{vm}/1.qcow2", "./2.qcow2", "")
    return stacked(*zip([vm / name for name in ("0.raw", "1.qcow2", "2.qcow2", "3.qcow2")], names, strict=True))


def elsewhere(vm: Path) -> list[Path]:
    """All but the active image in another folder, by names that begin there."""
    there = vm.parent / "layers"
    names = ("0.raw", "1.qcow2", f"{there}/2.qcow2", "")
    places = [there / "0.raw", there / "1.qcow2", there / "2.qcow2", vm / "3.qcow2"]
    return stacked(*zip(places, names, strict=True))


def by_links(vm: Path) -> list[Path]:
    """The name in a header is that of a link in the folder."""
    files = stacked(*((vm / name, f"link{name}") for name in ("0.raw", "1.qcow2", "2.qcow2", "3.qcow2")))
    for file in files:
        file.with_name(f"link{file.name}").symlink_to(file.name)
    return [*(file.with_name(f"link{file.name}") for file in files[:3]), files[3]]


SHORT = (relative, absolute, with_colons, mixed, elsewhere, by_links)
"""Chains whose images QEMU tells by the names that they were opened by."""


def between(vm: Path) -> list[Path]:
    """Relative names that lead from folder to folder: they begin in two, and there is one that a process is in."""
    there = vm.parent / "layers"
    names = ("0.raw", "../layers/1.qcow2", "2.qcow2", "")
    places = [there / "0.raw", there / "1.qcow2", vm / "2.qcow2", vm / "3.qcow2"]
    return stacked(*zip(places, names, strict=True))


def spelled_out(vm: Path) -> list[Path]:
    """By the prefix for a file, and by a ``json:`` name."""
    node = f'json:{{"driver": "qcow2", "file": {{"driver": "file", "filename": "{vm}/2.qcow2"}}}}'
    names = (f"file:{vm}/0.raw", "1.qcow2", node, "")
    return stacked(*zip([vm / name for name in ("0.raw", "1.qcow2", "2.qcow2", "3.qcow2")], names, strict=True))


@pytest.mark.parametrize("make", [*SHORT, between, spelled_out])
async def test_names_in_headers_of_every_kind(make: Callable[[Path], list[Path]], tmp_path: Path) -> None:
    """The chain is told by the names that the headers lead to, from wherever it is named; and it is merged."""
    files = make(tmp_path / "vm")
    content = Content()
    for number, file in enumerate(files):
        for line in (content.put(0x10 + number, number << 20, 3 << 19), content.put(0x20 + number, 6 << 20, 1 << 19)):
            run("qemu-io", "-f", FORMS[number], "-c", line, file)
    (tmp_path / "link").symlink_to("vm")
    allow = [str(tmp_path / "layers")]
    async with qmpmerge.offline(tmp_path / "link" / files[3].name, dry_run=True, allow=allow) as target:
        through = (await target.chain()).chain
        assert [image.name for image in through] == [file.name for file in files]
        assert [image.inode for image in through] == [(file.stat().st_dev, file.stat().st_ino) for file in files]
        assert through.active.file == f"{tmp_path}/link/{files[3].name}"
    async with qmpmerge.offline(files[3], allow=allow) as target:
        assert (await target.chain()).chain.files == list(map(str, files))
        told = await target.monitor.execute("query-named-block-nodes", flat=True)
        assert any(node["file"].startswith("json:") for node in told) == (make not in SHORT)
        outcome = await qmpmerge.commit(target, base=files[1], top=files[2], verify=True)
        assert outcome.after.files == [str(files[0]), str(files[1]), str(files[3])]
    remove(outcome)
    content.check(files[3], "qcow2")


async def test_an_image_that_cannot_be_written_is_named_by_its_path(images: list[Path]) -> None:
    """Not by the name that the daemon has for it, which begins in its folder."""
    async with qmpmerge.offline(images[3]) as target:
        base = (await target.chain()).chain.base
        images[0].rename(images[0].with_name("away"))
        with pytest.raises(NotWritable, match="No such file") as refused:
            await target.open_for_writing([base])
    assert refused.value.file == str(images[0])


HOLDER = """\
import os, sys
print(flush=True)
sys.stdin.readline()
os.close(int(sys.argv[1]))
print(flush=True)
sys.stdin.read()
"""


def open_in(stack: contextlib.ExitStack, files: Iterable[Path]) -> "subprocess.Popen[str]":
    """A process that has files open, and closes the last one when it is given a line."""
    opened = [stack.enter_context(file.open()).fileno() for file in files]
    command = [sys.executable, "-c", HOLDER, str(opened[-1])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "pass_fds": opened, "text": True}
    process: subprocess.Popen[str] = stack.enter_context(subprocess.Popen(command, **pipes))  # type: ignore[call-overload]
    assert process.stdout is not None
    process.stdout.readline()
    return process


async def test_what_the_daemon_has_open_for_a_moment_is_nothing_that_it_was_given(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that reads a file of its own just then; what stays open is another image under the name, and is told."""
    other = tmp_path / "other"
    other.touch()
    layers = [
        Layer(str(file), "qcow2", inodes=frozenset({(file.stat().st_dev, file.stat().st_ino)})) for file in images
    ]
    async with qmpmerge.offline(images[3], dry_run=True) as target:
        with contextlib.ExitStack() as stack:
            process = open_in(stack, [*images, other])
            monkeypatch.setattr(target.monitor, "pid", process.pid)
            with pytest.raises(Replaced, match=f"QEMU has {other} open") as refused:
                await nodes.see_approved(target.monitor, layers, layers)
            assert refused.value.file == str(images[3])

            def waits() -> Iterator[float]:
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                process.stdout.readline()
                yield 0.0

            monkeypatch.setattr(nodes, "AGAIN_SECONDS", waits())
            await nodes.see_approved(target.monitor, layers, layers)


async def test_a_daemon_that_shows_nothing_has_swapped_nothing(
    images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have ended, or be hidden from us."""
    layers = [
        Layer(str(file), "qcow2", inodes=frozenset({(file.stat().st_dev, file.stat().st_ino)})) for file in images
    ]
    async with qmpmerge.offline(images[3], dry_run=True) as target:
        daemon = target.monitor.pid
        with subprocess.Popen(["sleep", "600"]) as process:
            monkeypatch.setattr(target.monitor, "pid", process.pid)
            with pytest.raises(NotSeen) as refused:
                await nodes.see_approved(target.monitor, layers, layers)
            process.kill()
        assert refused.value.unseen == [str(file) for file in images]
        assert daemon is not None
        end(str(daemon), signal.SIGKILL)
        monkeypatch.setattr(target.monitor, "pid", daemon)
        with pytest.raises(SessionLost):
            await nodes.see_approved(target.monitor, layers, layers)


def test_the_daemon_starts_where_most_names_begin() -> None:
    def layers(*images: tuple[str, str | None]) -> list[Layer]:
        return [Layer(file, "qcow2", backing) for file, backing in images]

    def names(found: list[Layer]) -> list[str]:
        return [image.name for image in nodes.named(found, nodes.folder_of(found))]

    one = layers(("/a/1", None), ("/a/2", "1"), ("/b/3", "../a/2"), ("/a/4", "/b/3"), ("/a/5", "4"))
    assert nodes.folder_of(one) == "/a"
    assert names(one) == ["1", "/a/2", "/b/3", "4", "/a/5"]
    other = layers(("/a/1", None), ("/b/2", "/a/1"), ("/c/3", "file:/b/2"), ("/c/4", 'json:{"driver": "qcow2"}'))
    assert nodes.folder_of(other) == "/c"
    assert names(other) == ["/a/1", "/b/2", "/c/3", "/c/4"]


async def test_a_merge_of_one_in_two_hundred(tmp_path: Path) -> None:
    """What QEMU tells of 200 images, made anew at every question, would else be some 4 MB: it takes no more than it must."""
    images, content = empty_chain(tmp_path / "deep", 200), Content(64 << 20)
    fill(images[98:102], content)
    async with qmpmerge.offline(images[-1]) as target:
        told = await target.monitor.execute("query-named-block-nodes", flat=True)
        assert max(len(node["file"]) for node in told) <= len(str(images[-1]))
        outcome = await qmpmerge.commit(target, base="[100]", top="[101]")
    assert outcome.verdict == "merged"
    assert outcome.after.files == [str(image) for image in images if image != images[100]]
    assert all(above.backing == below.name for below, above in itertools.pairwise(outcome.after))
    content.check(images[101], "qcow2")
