"""
What is not written while a VM's images are inactive or a migration has them, and what QEMU makes of it when it is.
"""

import contextlib
import json
from pathlib import Path

import pytest
from rig import faults, migrations
from rig.command import invoke
from rig.disks import BACKEND, device, nodes
from rig.harms import harm
from rig.machines import MIB, Content, Machine, machine, run
from rig.migrations import INCOMING, STATES
from rig.wire import heard

import qmpmerge
from qmpmerge.errors import MigrationBegan, VmState

HARM = (
    "QEMU aborts where a header is rewritten; the other side of a migration goes on with the chain that it has opened"
)
JOB = "qmpmerge-commit-disk0"


@pytest.fixture
def disk(images: list[Path], content: Content) -> list[str]:
    """The arguments for the chain of four, filled."""
    return [*nodes(images), *device("c")]


def active(vm: Machine) -> bool:
    """Whether the images are; before 10.0 by what the active one lets others do with its file."""
    told = {node["node-name"]: node for node in vm.session.execute("query-named-block-nodes", flat=True)}
    if "active" in told["c"]:
        return bool(told["c"]["active"])
    graph = vm.session.execute("x-debug-query-block-graph")
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    (edge,) = [edge for edge in graph["edges"] if (names[edge["parent"]], edge["name"]) == ("c", "file")]
    return "write" not in edge["shared-perm"]


# --- the harm ---------------------------------------------------------------------------------------------------------


@harm(
    "vm-state",
    "QEMU aborts where a header is rewritten; the other side of a migration goes on with the chain that it has opened",
)
def test_plain_change_backing_file_kills_a_qemu_that_waits(tmp_path: Path, disk: list[str]) -> None:
    with migrations.waiting(tmp_path, disk) as vm:
        with pytest.raises((ValueError, ConnectionError)):
            vm.session.execute("change-backing-file", device="c", image_node_name="c", backing_file="b.qcow2")
        assert vm.process.wait(20) == -6


@harm(
    "vm-state",
    "QEMU aborts where a header is rewritten; the other side of a migration goes on with the chain that it has opened",
)
def test_plain_pivot_during_a_migration_leaves_the_other_side_behind(
    tmp_path: Path, disk: list[str], content: Content
) -> None:
    (tmp_path / "there").mkdir()
    with machine(tmp_path / "there", *disk, *INCOMING) as there, machine(tmp_path, *disk) as here:
        there.session.execute("migrate-incoming", uri=f"unix:{tmp_path}/wire")
        migrations.able(here, "pause-before-switchover")
        here.session.execute("cont")
        here.session.execute("migrate", uri=f"unix:{tmp_path}/wire")
        migrations.becomes(here, "pre-switchover")
        here.session.execute("block-commit", job_id="plain", device="c", auto_dismiss=False)
        here.wait_for_job("ready")
        here.session.execute("job-complete", id="plain")
        here.wait_for_job("concluded")
        here.session.execute("job-dismiss", id="plain")
        here.io(BACKEND, f"write -P 0x77 {4 * MIB} 64k")
        here.session.execute("migrate-continue", state="pre-switchover")
        migrations.becomes(here, "completed")
        migrations.becomes(there, "completed")
        there.session.execute("cont")  # or it does already
        with pytest.raises(AssertionError, match="Pattern verification failed"):
            there.io(BACKEND, f"read -P 0x77 {4 * MIB} 64k")


@pytest.mark.parametrize("node", ["base", "c"])
def test_plain_export_makes_inactive_images_active(node: str, tmp_path: Path, disk: list[str]) -> None:
    """So no flush of ours may be asked for there."""
    with migrations.waiting(tmp_path, disk) as vm:
        assert not active(vm)
        vm.session.execute("nbd-server-start", addr={"type": "unix", "data": {"path": f"{tmp_path}/nbd"}})
        vm.session.execute("block-export-add", type="nbd", id="e", node_name=node, name="e")
        told = {one["node-name"]: one for one in vm.session.execute("query-named-block-nodes", flat=True)}
        assert told[node].get("active", True)
        assert node == "base" or active(vm)


# --- refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
async def test_nothing_is_changed_on_disks_that_are_not_the_vms_own(
    state: str, tmp_path: Path, disk: list[str], content: Content
) -> None:
    with STATES[state](tmp_path, disk) as vm:
        before, was_active, hint = faults.digests(tmp_path), active(vm), ""
        for command in (
            ("commit", vm.target, "--top", "[3]"),
            ("commit", vm.target, "--top", "[3]", "--dry-run"),
            ("commit", vm.target),
            ("commit", vm.target, "--keep-overlay"),
            ("snapshot", vm.target, f"disk0={tmp_path}/d.qcow2"),
        ):
            done = invoke(*command, "--json")
            assert (done.code, done.document["error"]["name"]) == (3, "vm-state"), done
            assert done.document["error"]["facts"]["state"] in (state, "inactive")
            hint = done.document["error"]["hint"]
        for look in ("disks", "chain", "jobs", "doctor"):
            assert invoke(look, vm.target).code == 0
        assert (faults.digests(tmp_path), active(vm)) == (before, was_active)
        take_the_advice(vm, hint)
        assert invoke("snapshot", vm.target, f"disk0={tmp_path}/d.qcow2").code == 0
        assert invoke("commit", vm.target, "--top", "[4]").code == 0
        vm.stop()
    content.check(tmp_path / "d.qcow2")


def take_the_advice(vm: Machine, hint: str) -> None:
    if "migrate_cancel" in hint:
        migrations.cancel(vm)
    elif "`cont`" in hint:
        vm.session.execute("cont")
        vm.session.execute("stop")  # what else it would write is none of the content
    else:
        assert "wait until it is here" in hint
        migrations.load(vm)
        vm.session.execute("cont")
        vm.session.execute("stop")


async def test_a_guest_that_has_come_or_gone_and_was_paused_since_is_merged(tmp_path: Path, disk: list[str]) -> None:
    """Its images are active, whatever the last migration was."""
    for story in ("postmigrate", "paused"):
        folder = tmp_path / story
        folder.mkdir()
        with STATES[story](folder, disk) as vm:
            vm.session.execute("cont")
            vm.session.execute("stop")
            async with qmpmerge.live(vm.target) as target:
                assert (await qmpmerge.commit(target, dry_run=True)).verdict == "planned"


@pytest.mark.parametrize(
    "command",
    [
        ("disks", "{}"),
        ("chain", "{}"),
        ("jobs", "{}"),
        ("doctor", "{}"),
        ("commit", "{}"),
        ("commit", "{}", "--dry-run"),
        ("snapshot", "{}", "c=/nowhere"),
        ("job", "{}", JOB, "cancel"),
        ("job", "{}", JOB, "pivot"),
    ],
)
def test_before_the_machine_is_there_nothing_is_told(
    command: tuple[str, ...], tmp_path: Path, images: list[Path]
) -> None:
    with machine(tmp_path, *nodes(images), "-preconfig") as vm:
        done = invoke(*(part.format(vm.target) for part in command), "--json")
        error = done.document["error"]
        assert (done.code, error["name"], error["facts"]["state"]) == (3, "vm-state", "preconfig")
        assert "`x-exit-preconfig`" in error["hint"]
        vm.session.execute("x-exit-preconfig")
        assert invoke("disks", vm.target).code == 0


async def test_inactive_nodes_of_a_storage_daemon(tmp_path: Path, images: list[Path]) -> None:
    """It has no other state, and before 10.0 no such nodes."""
    if "version 7." in run("qemu-storage-daemon", "--version"):
        pytest.skip("no inactive nodes in this version")
    arguments = [part.replace("-blockdev", "--blockdev") for part in nodes(images)]
    arguments = [f"{part},active=off" if "node-name=c," in part else part for part in arguments]
    with machine(tmp_path, *arguments, program="qemu-storage-daemon") as daemon:
        async with qmpmerge.live(daemon.target) as target:
            with pytest.raises(VmState) as refused:
                await qmpmerge.commit(target, "c", top="[3]")
            assert refused.value.state == "inactive" and "`blockdev-set-active`" in refused.value.hint
            daemon.session.execute("blockdev-set-active", active=True)
            assert (await qmpmerge.commit(target, "c", top="[3]")).verdict == "merged"


# --- a job that is there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top", "verb"), [("[3]", "finalize"), ("[4]", "pivot"), ("[4]", "follow")])
def test_a_job_that_is_there_is_not_brought_to_its_end_during_a_migration(
    top: str, verb: str, tmp_path: Path, disk: list[str], content: Content, images: list[Path]
) -> None:
    """It waits, and so does the command that started it; afterwards both go on."""
    with machine(tmp_path, *disk) as vm:
        commit, status = ["commit", vm.target, "--top", top], "ready" if top == "[4]" else "pending"
        assert invoke(*commit, "--detach").code == 7
        vm.wait_for_job(status)
        with migrations.under_way(vm):
            for refused in (["job", vm.target, JOB, verb], commit):
                done = invoke(*refused, "--json")
                assert (done.code, done.document["error"]["name"]) == (3, "vm-state"), done
            vm.wait_for_job(status)
            migrations.cancel(vm)
        assert invoke("job", vm.target, JOB, verb).code == 0
        vm.stop()
    content.check(images[0] if top == "[4]" else images[3])


@pytest.mark.parametrize("top", ["[3]", None])
async def test_a_migration_that_begins_during_the_copy(
    top: str | None, tmp_path: Path, disk: list[str], content: Content, images: list[Path]
) -> None:
    """The job is taken back right before the switch, and the same command works after the migration."""
    with machine(tmp_path, *disk) as vm, contextlib.ExitStack() as stack:

        def begin(progress: qmpmerge.Progress) -> None:
            if progress.status == "running" and not (tmp_path / "nobody").exists():
                stack.enter_context(migrations.under_way(vm))
                vm.session.execute("block-job-set-speed", device=progress.job.id, speed=0)

        async with qmpmerge.live(vm.target) as target:
            with pytest.raises(MigrationBegan) as began:
                await qmpmerge.commit(target, top=top, speed=1, report=begin)
        assert began.value.state == "migration active"
        await faults.untouched(vm)
        migrations.cancel(vm)
        async with qmpmerge.live(vm.target) as target:
            assert (await qmpmerge.commit(target, top=top)).verdict in ("merged", "pivoted")
        vm.stop()
    content.check(images[0] if top is None else images[3])


def test_what_ended_unseen_is_not_proved_once_the_guest_has_gone(
    tmp_path: Path, disk: list[str], content: Content, images: list[Path]
) -> None:
    """To prove it takes a flush, which would make the images active."""
    with machine(tmp_path, *disk) as vm:
        assert invoke("commit", vm.target, "--top", "[3]", "--detach").code == 7
        vm.wait_for_job("pending")
        vm.session.execute("job-finalize", id=JOB)
        vm.wait_for_job("concluded")
        migrations.save(vm)
        again = ("commit", vm.target, "--top", "[3]")
        for command in (("job", vm.target, JOB, "follow"), again, again, ("recover", images[3], "--use", "base")):
            done = invoke(*map(str, command), "--json")
            assert (done.code, done.document["error"]["name"]) == (3, "vm-state"), done
        assert not active(vm)
        vm.session.execute("cont")
        assert invoke("commit", vm.target, "--top", str(images[2])).code == 0
        vm.stop()
    content.check(images[3])


# --- a dry run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["[3]", None])
async def test_a_dry_run_sends_nothing_that_writes(top: str | None, tmp_path: Path, disk: list[str]) -> None:
    sent: list[str] = []
    with machine(tmp_path, *disk) as vm:
        noting = heard(lambda way, text: sent.append(text) if way == "->" else None)
        async with noting, qmpmerge.live(vm.target) as target:
            outcome = await qmpmerge.commit(target, top=top, dry_run=True)
    asked = [json.loads(text) for text in sent]
    others = [one for one in asked if "query" not in one["execute"] and one["execute"] not in ("qom-get", "qom-list")]
    turns = [one["arguments"] for one in others if one["execute"] == "object-add"]
    assert {turn["qom-type"] for turn in turns} <= {"secret"}  # a place in the queue, which no disk knows of
    added = [
        one["arguments"] for one in others if one["execute"] == "blockdev-add"
    ]  # to see that a flush can be asked for
    assert all(node["read-only"] for node in added) and len(added) <= 2  # the other way is looked at too
    assert {one["execute"] for one in others} <= {
        "blockdev-add",
        "blockdev-del",
        "blockdev-reopen",
        "object-add",
        "object-del",
    }
    unseen = {check.name: check.reason for check in outcome.checks if check.result == "not checked"}
    assert list(unseen) == (["not-writable"] if top else [])
    assert all("header" in (reason or "") for reason in unseen.values())
