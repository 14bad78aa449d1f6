"""The block graph of real QEMUs: what each says of who uses what, and what of it deserves a look."""

from pathlib import Path

import pytest
from rig.disks import BACKEND, DEVICE, Setup, blockdev, device, filters, nodes, storage_daemon
from rig.machines import Content, Machine, machine, run

import qmpmerge
from qmpmerge.errors import NoSuchDisk
from qmpmerge.operations.graph import Graph
from qmpmerge.qemu import flush, mutex
from qmpmerge.qemu.usage import GraphEdge


async def asked(vm: Machine, disk: str | None = None) -> Graph:
    async with qmpmerge.live(vm.target) as target:
        return await qmpmerge.graph(target, disk)


def marks(graph: Graph) -> dict[str, dict[str, str]]:
    """Of each node that has any: names and sentences."""
    return {node.name: {mark.name: mark.message for mark in node.marks} for node in graph.nodes if node.marks}


def users(graph: Graph, node: str) -> dict[tuple[str, str], GraphEdge]:
    return {(edge.kind, edge.parent): edge for edge in graph.edges if edge.node == node}


def overlay(vm: Machine, name: str, **more: object) -> None:
    """One more image on the base."""
    file = vm.folder / f"{name}.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", file, "8M")
    stored = {"driver": "file", "node-name": f"{name}-file", "filename": str(file)}
    vm.session.execute("blockdev-add", driver="qcow2", node_name=name, file=stored, backing="base", **more)


def export(vm: Machine, **given: object) -> None:
    vm.session.execute("block-export-add", type="nbd", **given)


def serve(vm: Machine) -> None:
    vm.session.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(vm.folder / "nbd")}})


async def test_who_uses_what_and_who_is_in_the_way(tmp_path: Path, images: list[Path], content: Content) -> None:
    with filters(tmp_path, images, content) as setup:
        vm = setup.machine
        quiet = await asked(vm)
        assert marks(quiet) == {"throttled": {"throttled": "limits what goes through it (throttle group limits)"}}
        assert all(node.used for node in quiet.nodes) and quiet.not_known == ()
        device = users(quiet, "cor")["device", "disk0"]
        assert (device.role, device.takes) == ("root", ("consistent-read", "write"))
        assert device.lets == ("consistent-read", "write-unchanged", "resize")

        serve(vm)
        export(vm, id="e0", node_name="base")
        export(vm, id="e1", node_name="a", name="a")
        overlay(vm, "unused")
        busy = await asked(vm)
        assert users(busy, "base")["export", "e0"].lets == ("consistent-read", "write", "write-unchanged")
        assert [(one.id, one.type, one.node) for one in busy.exports] == [("e1", "nbd", "a"), ("e0", "nbd", "base")]
        assert {node.name for node in busy.nodes if not node.used} == {"unused", "unused-file"}
        assert marks(busy) == {
            **marks(quiet),
            "unused": {"unneeded": "no device, export or job uses it"},
            "a": {"commit-across": "no commit of disk0 across it: export e1 reads it"},
        }
        limits = dict.fromkeys(("bps", "bps_rd", "iops", "iops_rd", "iops_wr"), 0)
        vm.session.execute("block_set_io_throttle", id=BACKEND, bps_wr=10**6, group="slow", **limits)
        assert marks(await asked(vm))["cor"] == {"throttled": "what device disk0 does is limited (throttle group slow)"}
        one = await asked(vm, "disk0")
        assert (one.disk, {disk.name for disk in one.disks}) == ("disk0", {"disk0"})
        assert {node.name for node in busy.nodes} - {node.name for node in one.nodes} == {"unused", "unused-file"}
        with pytest.raises(NoSuchDisk):
            await asked(vm, "nope")


TWO = [part.format("second").replace("disk0", "disk1") for part in DEVICE]


async def test_a_base_of_two_disks_and_what_qemu_says_of_it(tmp_path: Path, images: list[Path]) -> None:
    """Whoever is told to be in the way is, and who is not is not."""
    second = tmp_path / "second.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", second, "8M")
    stored = f"qcow2,node-name=second,backing=base,file.driver=file,file.filename={second}"
    with machine(tmp_path, *nodes(images), "-blockdev", stored, *device("c"), *TWO) as vm:
        graph = await asked(vm)
        (base,) = [node for node in graph.nodes if node.marks]
        assert base.name == "base" and set(users(graph, "base")) == {("node", "a"), ("node", "second")}
        assert [mark.message for mark in base.marks] == [
            "no commit of disk0 into it: node second lets nobody else write",
            "no commit of disk1 into it: node a lets nobody else write",
        ]
        given = {"job_id": "j", "device": "c", "top_node": "b", "base_node": "base"}
        assert "unshared by node 'second'" in vm.session.ask("block-commit", **given)["error"]["desc"]
        vm.session.execute("block-commit", **{**given, "base_node": "a"})


async def test_a_job_from_its_start_to_its_pivot(tmp_path: Path, images: list[Path], content: Content) -> None:
    with blockdev(tmp_path, images, content) as setup:
        vm = setup.machine
        commit = {"job_id": "j", "device": "c", "base_node": "base", "speed": 1, "auto_finalize": False}
        vm.session.execute("block-commit", top_node="b", **commit)
        running = await asked(vm)
        (filtered,) = [node for node in running.nodes if node.driver == "commit_top"]
        assert marks(running) == {filtered.name: {"job-filter": "filter of job j (commit, running)"}}
        assert {edge.kind for edge in users(running, "base").values()} == {"node", "job"}
        assert [job.id for job in running.jobs] == ["j"]
        vm.session.execute("block-job-cancel", device="j")
        vm.wait_until_gone()

        serve(vm)
        export(vm, id="backup", node_name="base")
        vm.session.execute("block-commit", **{**commit, "speed": 0, "auto_finalize": True})
        vm.wait_for_job("ready")
        ready = await asked(vm)
        (filtered,) = [node for node in ready.nodes if node.driver in ("mirror_top", "commit_top")]
        assert marks(ready) == {
            filtered.name: {"job-filter": "filter of job j (commit, ready)"},
            "base": {"pending-pivot": "once job j is completed, disk0 is moved here"},
        }
        assert {kind for kind, _ in users(ready, "base")} == {"node", "job", "export"}, "it alone only reads"
        roles = {edge.role for edge in ready.edges if (edge.kind, edge.parent) == ("job", "j")}
        assert {"main node", "source", "target", "intermediate node", "root"} <= roles


async def test_a_mirror_and_a_backup_to_elsewhere(tmp_path: Path, images: list[Path], content: Content) -> None:
    with blockdev(tmp_path, images, content) as setup:
        vm = setup.machine
        for name in ("copy", "saved"):
            run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / f"{name}.qcow2", "8M")
            stored = {"driver": "file", "filename": str(tmp_path / f"{name}.qcow2")}
            vm.session.execute("blockdev-add", driver="qcow2", node_name=name, file=stored)
        vm.session.execute("blockdev-backup", job_id="b", device="c", target="saved", sync="full", speed=1)
        graph = await asked(vm, "disk0")
        (filtered,) = [node for node in graph.nodes if node.driver == "copy-before-write"]
        assert marks(graph)[filtered.name] == {"job-filter": "filter of job b (backup, running)"}
        assert "job-target" in marks(graph)["saved"]
        vm.session.execute("block-job-cancel", device="b")
        vm.wait_until_gone()
        vm.session.execute("blockdev-mirror", job_id="m", device="c", target="copy", sync="top")
        vm.wait_for_job("ready")
        assert marks(await asked(vm))["copy"] == {"pending-pivot": "once job m is completed, disk0 is moved here"}


async def test_the_exports_of_a_storage_daemon(tmp_path: Path, images: list[Path], content: Content) -> None:
    """Two that do not do the same have no names of their own."""
    with storage_daemon(tmp_path, images, content) as setup:
        vm = setup.machine
        graph = await asked(vm)
        assert users(graph, "c")["export", "export0"].takes == ("consistent-read", "write")
        export(vm, id="reader", node_name="c", name="more")
        several = [edge for edge in (await asked(vm)).edges if edge.node == "c"]
        assert {(edge.kind, edge.parent) for edge in several} == {("other", "reader or export0")}


async def test_the_node_of_a_merge_that_flushes_is_an_instrument(setup: Setup) -> None:
    vm = setup.machine
    image = vm.session.execute("query-block")[0]["inserted"]["node-name"]
    vm.session.execute("blockdev-add", driver="blkdebug", node_name=flush.NODE, image=image, read_only=True)
    async with qmpmerge.live(vm.target) as target:
        async with mutex.taken(mutex.FLUSH, target.monitor):
            assert [*marks(await qmpmerge.graph(target))[flush.NODE]] == ["instrument"]
        assert [*marks(await qmpmerge.graph(target))[flush.NODE]] == ["unneeded"]


async def test_a_qemu_that_does_not_tell_its_graph(tmp_path: Path, images: list[Path]) -> None:
    with machine(tmp_path, "-compat", "unstable-input=reject", *nodes(images), *device("c")) as vm:
        graph = await asked(vm)
        assert "x-debug-query-block-graph" in graph.not_known[0]
        assert {(edge.takes, edge.lets) for edge in graph.edges} == {(None, None)}
        assert {node.used for node in graph.nodes} == {None} and marks(graph) == {}
        assert [image.node for image in graph.disks[0].chain or ()] == ["base", "a", "b", "c"]


async def test_images_that_no_vm_uses(images: list[Path]) -> None:
    """Told by a daemon of ours too, whose permissions are nobody's."""
    for written in (False, True):
        async with qmpmerge.offline(images[-1], write=written) as target:
            graph = await qmpmerge.graph(target, "c.qcow2")
        assert (graph.is_live, graph.disk, len(graph.not_known)) == (False, "c.qcow2", 1)
        assert {(edge.takes, edge.lets) for edge in graph.edges} == {(None, None)}
        assert [node.file for node in graph.nodes if node.file] == [str(image) for image in reversed(images)]
        assert marks(graph) == {}
