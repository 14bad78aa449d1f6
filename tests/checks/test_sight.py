"""
Where an image really lies, on real QEMUs that have moved to another folder, are in another mount namespace, or belong to
somebody else: what cannot be seen is not passed, and never taken for a file of ours.
"""

import contextlib
import json
import os
import re
import shlex
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rig.command import COMMAND, Run, held, invoke, prints_json
from rig.disks import device, end, nodes
from rig.harms import harm
from rig.machines import MIB, Content, Machine, fill, machine, make_chain, run

import qmpmerge
from qmpmerge.errors import KnownBad, NotReopenable, NotSeen, SeveralRefusals

NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may be somebody else, or write to /")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vm").mkdir()
    return tmp_path / "vm"


@pytest.fixture
def images(folder: Path, content: Content) -> list[Path]:
    found = make_chain(folder)
    fill(found, content)
    return found


def view(image: Path) -> bytes:
    """What an image shows, whoever holds it."""
    run("qemu-img", "convert", "-U", "-O", "raw", image, image.with_suffix(".view"))
    data = image.with_suffix(".view").read_bytes()
    image.with_suffix(".view").unlink()
    return data


def states(document: Any) -> dict[str, str]:
    """Of each check; but for a loop device that somebody else has on this host, on what nobody may see."""
    strange = re.compile(r"/dev/loop\d+ lies on ")
    return {
        check["name"]: "passed" if strange.match(check["reason"] or "") else check["result"]
        for check in document["checks"]
    }


# --- a daemon, which has moved to / -----------------------------------------------------------------------------------


@contextlib.contextmanager
def daemon(folder: Path, *arguments: str, before: Sequence[str] = ()) -> Iterator[Machine]:
    """A QEMU that was started in `folder`, and is in / now."""
    pidfile = folder / "pid"
    with machine(folder, *arguments, "-daemonize", "-pidfile", str(pidfile), before=before) as vm:
        assert vm.process.wait(60) == 0
        pid = pidfile.read_text().strip()
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        try:
            yield vm
        finally:
            end(pid)


def relative(image: Path, *options: str) -> list[str]:
    return ["-drive", ",".join([f"file={image.name},format=qcow2,if=none,id=vda", *options]), *device("vda")]


@pytest.mark.parametrize("environment", ["PWD=/", "PWD=../wrong", "-u PWD", None])
async def test_the_files_of_a_daemon_are_found_by_what_it_has_open(
    environment: str | None, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its environment says, and whatever lies under these names where we are."""
    (tmp_path / "wrong").mkdir()
    make_chain(tmp_path / "wrong")
    monkeypatch.chdir(tmp_path / "wrong")
    before = ["env", *environment.replace("../wrong", str(tmp_path / "wrong")).split()] if environment else []
    with daemon(images[0].parent, *relative(images[3]), before=before) as vm:
        async with qmpmerge.live(vm.target) as target:
            chain = (await target.chain()).chain
    assert chain.files == [str(image) for image in images]
    assert [image.inode for image in chain] == [(os.stat(image).st_dev, os.stat(image).st_ino) for image in images]


@pytest.mark.parametrize("name", ["base.raw", "c.qcow2"])
async def test_nothing_is_put_on_what_qemu_could_not_open_again(
    name: str, images: list[Path], tmp_path: Path, content: Content
) -> None:
    """QEMU would not have the one, and nothing could be merged into the other while the VM runs."""
    given = f"file={name},format={name.rpartition('.')[2]},if=none,id=vda"
    with daemon(images[0].parent, "-drive", given, *device("vda")) as vm:
        for words in (["--dry-run"], []):
            told = invoke("snapshot", vm.target, f"vda={tmp_path}/new.qcow2", *words, "--json")
            assert (told.code, told.document["error"]["name"]) == (3, "not-reopenable"), words
    assert not (tmp_path / "new.qcow2").exists()


async def test_two_files_that_a_name_can_mean_are_not_guessed_between(images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    other = make_chain(tmp_path / "second")
    second = ["-drive", f"file={other[3]},format=qcow2,if=none,id=vdb"]
    with daemon(images[0].parent, *relative(images[3]), *second) as vm:
        async with qmpmerge.live(vm.target) as target:
            chain = (await target.chain("vda")).chain
            assert chain.files == ["qemu:base.raw", "qemu:a.qcow2", "qemu:b.qcow2", "qemu:c.qcow2"]
            with pytest.raises(SeveralRefusals) as several:
                await qmpmerge.commit(target, "vda")
            with pytest.raises(NotSeen):
                await qmpmerge.snapshot(target, {"vda": images[0].parent / "new.qcow2"})
    assert "not-seen" in [refusal.name for refusal in several.value.refusals]
    assert not (images[0].parent / "new.qcow2").exists()


def test_plain_commit_in_a_daemon_fails(images: list[Path]) -> None:
    with daemon(images[0].parent, *relative(images[3])) as vm:
        said = vm.session.ask("block-commit", job_id="plain", device="vda")
        assert said["error"]["desc"] == "Could not open 'base.raw': No such file or directory"


async def test_a_name_that_leads_nowhere_any_more_is_refused(images: list[Path]) -> None:
    with daemon(images[0].parent, *relative(images[3])) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(NotReopenable) as refused:
                await qmpmerge.commit(target)
            assert (refused.value.file, refused.value.known_as) == (str(images[0]), "base.raw")
            with pytest.raises(SeveralRefusals) as several:  # b.qcow2 is rewritten, and only read so far
                await qmpmerge.commit(target, top="[2]")
            assert [one.facts["known_as"] for one in several.value.refusals] == ["base.raw", "b.qcow2"]


@needs_root
async def test_a_stranger_under_the_name_is_not_put_below_an_overlay(images: list[Path]) -> None:
    """QEMU opens the old active image again to read it; the guest would read the stranger."""
    top = images[3].with_name(f"qmpmerge-test-{uuid.uuid4().hex}.qcow2")
    images[3].rename(top)
    stranger = Path("/", top.name)
    try:
        run("qemu-img", "create", "-q", "-f", "qcow2", stranger, "8M")
        with daemon(top.parent, *relative(top)) as vm:
            async with qmpmerge.live(vm.target) as target:
                with pytest.raises(NotReopenable, match=str(stranger)):
                    await qmpmerge.snapshot(target, {"vda": top.with_name("new.qcow2")})
        assert not top.with_name("new.qcow2").exists()
    finally:
        stranger.unlink()


def test_a_snapshot_where_neither_process_nor_name_is_sure(images: list[Path]) -> None:
    """By TCP, and with another file under the name, which QEMU would take."""
    monitor = ["-qmp", "tcp:127.0.0.1:0,server=on,wait=off"]
    with machine(images[0].parent, "-drive", f"file={images[3]},if=none,id=vda", *device("vda"), *monitor) as vm:
        names = [one["filename"] for one in vm.session.execute("query-chardev") if "tcp:" in one["filename"]]
        target = f"tcp:127.0.0.1:{re.findall('[0-9]+', names[0])[-1]}"
        images[3].rename(images[3].with_name("away.qcow2"))
        images[3].write_bytes(images[3].with_name("away.qcow2").read_bytes())
        done = invoke("snapshot", target, f"vda={images[3].parent}/new.qcow2", "--json")
    assert (done.code, done.document["error"]["name"]) == (3, "not-seen")


@needs_root
async def test_a_stranger_under_the_name_is_not_written(images: list[Path]) -> None:
    """And plain block-commit writes into it."""
    base = images[0].with_name(f"qmpmerge-test-{uuid.uuid4().hex}.raw")
    images[0].rename(base)
    run("qemu-img", "rebase", "-u", "-F", "raw", "-b", base.name, images[1])
    stranger = Path("/", base.name)
    try:
        stranger.write_bytes(bytes(8 * MIB))
        with daemon(base.parent, *relative(images[3])) as vm:
            async with qmpmerge.live(vm.target) as target:
                with pytest.raises(NotReopenable) as refused:
                    await qmpmerge.commit(target)
            assert str(stranger) in str(refused.value)
            assert stranger.read_bytes() == bytes(8 * MIB)
            vm.session.execute("block-commit", job_id="plain", device="vda", auto_dismiss=False)
            vm.wait_for_job("ready")
        assert stranger.read_bytes() != bytes(8 * MIB)
    finally:
        stranger.unlink(missing_ok=True)


@pytest.mark.parametrize("way", ["absolute", "opened for writing"])
async def test_what_a_daemon_can_open_again_is_merged(way: str, images: list[Path], content: Content) -> None:
    options = nodes(images)
    if way == "opened for writing":
        options = [part.replace(f"{images[0].parent}/", "").replace(",auto-read-only=on", "") for part in options]
    with daemon(images[0].parent, *options, *device("c")) as vm:
        async with qmpmerge.live(vm.target) as target:
            assert (await qmpmerge.commit(target, top="[3]")).verdict == "merged"
            assert (await qmpmerge.commit(target)).verdict == "pivoted"
    content.check(images[0])


# --- descriptors --------------------------------------------------------------------------------------------------------


def handed_over(images: list[Path], which: Sequence[int], *, locking: str) -> list[str]:
    """Nodes of which some have descriptors that their opener, see `opener`, has passed on."""
    options = nodes(images)
    for number in which:
        options = [part.replace(f"filename={images[number]}", f"filename=/dev/fdset/{number}") for part in options]
    options = [f"{part},locking={locking}" if part.startswith("file,") else part for part in options]
    added = [[f"fd={50 + number},set={number}", f"fd={60 + number},set={number}"] for number in which]
    return [*(word for pair in added for fd in pair for word in ("-add-fd", fd)), *options, *device("c")]


def opener(images: list[Path], which: Sequence[int]) -> list[str]:
    opened = " ".join(f"{50 + n}<>{shlex.quote(str(images[n]))} {60 + n}<{shlex.quote(str(images[n]))}" for n in which)
    return ["bash", "-c", f'exec {opened}; exec "$@"', "bash"]


async def test_plain_commit_into_a_descriptor_crashes_qemu(images: list[Path], tmp_path: Path) -> None:
    """With locks; and it is refused, for what it is."""
    with machine(tmp_path, *handed_over(images, [0], locking="on"), before=opener(images, [0])) as vm:
        async with qmpmerge.live(vm.target) as target:
            for top in (None, "[3]"):
                with pytest.raises(SeveralRefusals) as several:
                    await qmpmerge.commit(target, top=top)
                found = [refusal for refusal in several.value.refusals if isinstance(refusal, NotSeen | KnownBad)]
                assert [one.name for one in found] == ["not-seen", "known-bad"]
                assert "descriptor" in str(found[0]) and "chattr" not in several.value.hint
        with contextlib.suppress(OSError, ValueError):
            merge = {"top_node": "b", "base_node": "base", "auto_dismiss": False}
            vm.session.execute("block-commit", job_id="plain", device="c", **merge)
            vm.wait_for_job("concluded")
        assert vm.process.wait(20) < 0


@pytest.mark.parametrize("top", [None, "[3]"])
@pytest.mark.parametrize("which", [[0, 1, 2, 3], [1]])
async def test_descriptors_without_locks_are_merged_where_insisted(
    top: str | None, which: list[int], images: list[Path], tmp_path: Path, content: Content
) -> None:
    # Of a layer that was handed over nobody knows that it is the one which lies beside the others.
    force = ["not-seen", "known-bad"] if 0 in which else ["not-seen", "dependents"]
    with machine(tmp_path, *handed_over(images, which, locking="off"), before=opener(images, which)) as vm:
        async with qmpmerge.live(vm.target) as target:
            outcome = await qmpmerge.commit(target, top=top, force=force)
        assert outcome.verdict == ("pivoted" if top is None else "merged")
    content.check(images[0] if top is None else images[3])


# --- another mount namespace --------------------------------------------------------------------------------------------


def namespace(*mounts: str) -> list[str]:
    """A command that runs another one behind mounts of its own; skips where we may not."""
    command = ["unshare", "--mount", "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no leave to have a mount namespace: {tried.stderr}")
    return command


@pytest.fixture
def container(tmp_path: Path, folder: Path, images: list[Path], content: Content) -> Iterator[tuple[Machine, Path]]:
    """A QEMU for which other files lie in the images' folder than for us, and where its files really are."""
    inside = tmp_path / "inside"
    folder.rename(inside)
    folder.mkdir()
    make_chain(folder)
    before = namespace(f"mount --bind {shlex.quote(str(inside))} {shlex.quote(str(folder))}")
    with machine(tmp_path, *nodes(images), *device("c"), before=before) as vm:
        yield vm, inside


@harm("not-seen", "an image that is built on the base, and that only QEMU's mount namespace shows, is ruined")
def test_plain_commit_ruins_what_only_qemu_sees(container: tuple[Machine, Path]) -> None:
    vm, inside = container
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "other.qcow2", cwd=inside)
    before = view(inside / "other.qcow2")
    vm.session.execute("block-commit", job_id="plain", device="c", auto_dismiss=False)
    vm.wait_for_job("ready")
    assert view(inside / "other.qcow2") != before


async def test_what_lies_under_these_names_for_us_is_not_taken_for_qemus(
    container: tuple[Machine, Path], folder: Path
) -> None:
    vm, inside = container
    before = {file: file.read_bytes() for file in folder.iterdir()}
    async with qmpmerge.live(vm.target) as target:
        seen = await target.chain()
        assert seen.chain.files == [f"qemu:{folder}/{name}" for name in ("base.raw", "a.qcow2", "b.qcow2", "c.qcow2")]
        assert {odd.name for odd in seen.oddities} == {"not-seen"}
        for top in (None, "[3]"):
            with pytest.raises(NotSeen) as refused:
                await qmpmerge.commit(target, top=top)
            assert "mount namespace" in refused.value.reason
        with pytest.raises(NotSeen):
            await qmpmerge.snapshot(target, {"disk0": folder / "new.qcow2"})
    assert "not-seen" in invoke("doctor", vm.target).out
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    assert {file.name for file in inside.iterdir()} == {"base.raw", "a.qcow2", "b.qcow2", "c.qcow2"}


@pytest.mark.parametrize("top", [None, "[3]"])
def test_insisted_on_it_is_qemus_doing_alone(
    top: str | None, container: tuple[Machine, Path], folder: Path, content: Content
) -> None:
    vm, inside = container
    before = {file: file.read_bytes() for file in folder.iterdir()}
    asked = ["commit", vm.target, "--force", "not-seen", *(["--top", top] if top else []), "--json"]
    planned = invoke(*asked, "--dry-run").document
    unseen = {name for name, result in states(planned).items() if result == "not checked"}
    assert states(planned)["not-seen"] == "forced"
    assert {"dependents", "replaced", "disagrees", "in-use"} <= unseen
    assert all(check["reason"] for check in planned["checks"] if check["result"] == "not checked")
    assert invoke(*asked).code == 0
    vm.stop()
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    content.check(inside / ("base.raw" if top is None else "c.qcow2"))


def test_the_cure_of_a_pull_pulls_in_the_namespace(container: tuple[Machine, Path], content: Content) -> None:
    vm, inside = container
    refused = invoke("pull", vm.target)
    done = typed_as_told(refused.err)
    assert done.returncode == 0, done.stderr
    vm.stop()
    assert "backing file" not in run("qemu-img", "info", inside / "c.qcow2")
    content.check(inside / "c.qcow2")


def typed_as_told(said: str) -> subprocess.CompletedProcess[str]:
    """What is run in QEMU's mount namespace, as the hint has it."""
    command = said.partition("`nsenter")[2].partition("`")[0]
    environment = {**os.environ, "PATH": f"{os.path.dirname(COMMAND)}:{os.environ['PATH']}"}
    return subprocess.run(
        ["sh", "-c", f"nsenter{command}"], capture_output=True, text=True, env=environment, check=False
    )


def test_the_cure_looks_and_merges_in_the_namespace(container: tuple[Machine, Path], content: Content) -> None:
    """Typed as it is printed: it sees who is built on the images there, and merges when nobody is any more."""
    vm, inside = container
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "other.qcow2", cwd=inside)
    refused = invoke("commit", vm.target)
    done = typed_as_told(refused.err)
    assert (done.returncode, "other.qcow2" in done.stderr) == (3, True), done.stderr
    (inside / "other.qcow2").unlink()
    done = typed_as_told(refused.err)
    assert done.returncode == 0, done.stderr
    vm.stop()
    content.check(inside / "base.raw")


async def test_the_same_files_in_another_namespace_are_ours(
    images: list[Path], tmp_path: Path, content: Content
) -> None:
    """As with systemd's PrivateTmp."""
    (tmp_path / "private").mkdir()
    before = namespace(f"mount -t tmpfs tmpfs {shlex.quote(str(tmp_path / 'private'))}")
    with machine(tmp_path, *nodes(images), *device("c"), before=before) as vm:
        async with qmpmerge.live(vm.target) as target:
            planned = await qmpmerge.commit(target, dry_run=True)
            assert {check.result for check in planned.checks} == {"passed"}
            assert (await qmpmerge.commit(target)).verdict == "pivoted"
    content.check(images[0])


async def test_a_file_that_is_ours_in_a_folder_that_is_not(images: list[Path], folder: Path, tmp_path: Path) -> None:
    """As where images are mounted into a container one by one: what else lies there we cannot see."""
    inside = tmp_path / "inside"
    inside.mkdir()
    mounts = []
    for image in images:
        (inside / image.name).touch()
        mounts.append(shlex.join(["mount", "--bind", str(image), str(inside / image.name)]))
    before = namespace(*mounts, shlex.join(["mount", "--rbind", str(inside), str(folder)]))
    with machine(tmp_path, *nodes(images), *device("c"), before=before) as vm:
        async with qmpmerge.live(vm.target) as target:
            assert (await target.chain()).chain.files == [str(image) for image in images]
            with pytest.raises(NotSeen) as refused:
                await qmpmerge.commit(target)
            assert refused.value.unseen == [str(folder)]
            with pytest.raises(NotSeen):
                await qmpmerge.snapshot(target, {"disk0": folder / "new.qcow2"})


async def test_a_link_that_only_qemus_namespace_shows(images: list[Path], tmp_path: Path, content: Content) -> None:
    """With an absolute name, by which QEMU opens the base again; for us nothing is there."""
    private = tmp_path / "private"
    private.mkdir()
    linked = [private / image.name for image in images]
    links = [shlex.join(["ln", "-s", str(image), str(link)]) for image, link in zip(images, linked, strict=True)]
    before = namespace(f"mount -t tmpfs tmpfs {shlex.quote(str(private))}", *links)
    with machine(tmp_path, *nodes(linked), *device("c"), before=before) as vm:
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(NotSeen):
                await qmpmerge.commit(target)
            assert (await qmpmerge.commit(target, force=["not-seen"])).verdict == "pivoted"
    content.check(images[0])


async def test_a_base_that_is_another_one_in_qemus_namespace_is_not_merged(
    images: list[Path], tmp_path: Path, content: Content
) -> None:
    """Opened before something was mounted over it: we see the file that is open, QEMU would open another one."""
    stranger = tmp_path / "stranger"
    stranger.write_bytes(bytes(8 * MIB))
    with machine(tmp_path, *nodes(images), *device("c"), before=namespace("true")) as vm:
        run("nsenter", "--target", str(vm.process.pid), "--mount", "mount", "--bind", stranger, images[0])
        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(NotReopenable):
                await qmpmerge.commit(target)
    assert stranger.read_bytes() == bytes(8 * MIB)


# --- other users --------------------------------------------------------------------------------------------------------


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user may enter, which those of pytest are not."""
    with tempfile.TemporaryDirectory(prefix="qmpmerge-test-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def as_nobody(*arguments: str) -> Run:
    done = subprocess.run([*NOBODY, COMMAND, *arguments], capture_output=True, text=True, check=False)
    if "Permission denied" in done.stderr and COMMAND in done.stderr:
        pytest.skip(f"nobody may not run {COMMAND}")
    assert "Traceback" not in done.stderr, done.stderr
    run = Run(done.returncode, done.stdout, done.stderr)
    return held(run) if prints_json(arguments) else run


@contextlib.contextmanager
def of_root(folder: Path, *arguments: str) -> Iterator[Machine]:
    """A QEMU into whose process nobody else may look, though its monitor and images are everybody's."""
    with machine(folder, *arguments) as vm:
        os.chmod(vm.target, 0o666)
        yield vm


@needs_root
def test_a_folder_that_may_not_be_listed_is_not_passed(shared: Path) -> None:
    """By nobody, of nobody's QEMU, in a folder that may be entered."""
    images = make_chain(shared)
    for path in [shared, *images]:
        os.chown(path, 65534, 65534)
    with machine(shared, *nodes(images), *device("c"), before=NOBODY) as vm:
        os.chown(shared, 0, 0)
        planned = states(as_nobody("commit", vm.target, "--dry-run", "--json").document)
        assert {name for name, result in planned.items() if result != "passed"} == {
            "in-use"
        }  # others may have no locks
        os.chmod(shared, 0o711)
        refused = as_nobody("commit", vm.target, "--dry-run", "--json")
        error = refused.document["error"]
        assert (refused.code, error["name"], error["facts"]["unseen"]) == (3, "not-seen", [str(shared)])
        forced = as_nobody("commit", vm.target, "--dry-run", "--force", "not-seen", "--json").document
        assert {name: result for name, result in states(forced).items() if result != "passed"} == {
            "not-seen": "forced",
            "in-use": "not checked",
            "dependents": "not checked",
        }


@needs_root
def test_a_file_that_may_not_be_read_is_not_passed(shared: Path) -> None:
    images = make_chain(shared)
    for image in images:
        os.chown(image, 65534, 65534)
    secret = shared / "secret.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", secret)
    secret.chmod(0o600)
    os.chown(shared, 65534, 65534)
    with machine(shared, *nodes(images), *device("c"), before=NOBODY) as vm:
        planned = as_nobody("commit", vm.target, "--dry-run", "--json").document
    assert {name: result for name, result in states(planned).items() if result != "passed"} == {
        "in-use": "not checked",
        "dependents": "not checked",
    }
    (reason,) = [check["reason"] for check in planned["checks"] if check["name"] == "dependents"]
    assert str(secret) in reason


@needs_root
def test_the_locks_tell_where_the_process_does_not(shared: Path) -> None:
    """Of another user's QEMU; and of a second one that has the base too."""
    (shared / "vm").mkdir()
    images = make_chain(shared / "vm")
    with of_root(shared, *nodes(images), *device("c")) as vm:
        planned = as_nobody("commit", vm.target, "--dry-run", "--json").document
        assert {name for name, result in states(planned).items() if result != "passed"} == {"replaced", "in-use"}
        (shared / "far").mkdir()
        far = make_chain(shared / "far", ["other.raw", "other.qcow2"])
        run("qemu-img", "rebase", "-u", "-F", "raw", "-b", images[0], far[1])
        other = ["-drive", f"file={far[1]},format=qcow2,if=none,id=vda", *device("vda")]
        with machine(shared / "far", *other):
            refused = as_nobody("commit", vm.target, "--dry-run", "--json").document["error"]
    assert (refused["name"], refused["facts"]["file"]) == ("in-use", str(images[0]))
    assert refused["facts"]["holders"] == ["a process that we may not see"]


@needs_root
def test_neither_process_nor_locks_tell(shared: Path) -> None:
    (shared / "vm").mkdir()
    images = make_chain(shared / "vm")
    unlocked = [f"{part},locking=off" if part.startswith("file,") else part for part in nodes(images)]
    with of_root(shared, *unlocked, *device("c")) as vm:
        refused = as_nobody("commit", vm.target, "--dry-run", "--json")
        error = refused.document["error"]
        assert (refused.code, error["name"], error["facts"]["unseen"]) == (3, "not-seen", [str(one) for one in images])
        forced = as_nobody("commit", vm.target, "--dry-run", "--force", "not-seen", "--json").document
        assert {name for name, result in states(forced).items() if result == "not checked"} == {"replaced", "in-use"}
        assert set(states(json.loads(invoke("commit", vm.target, "--dry-run", "--json").out)).values()) == {"passed"}
