"""
Held: all is copied, and nothing is switched until somebody goes on, whatever the guest writes and whoever dies meanwhile.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from rig import advice, faults
from rig.command import JOB, Run, invoke
from rig.disks import BACKEND, KINDS, Setup, drive
from rig.machines import MIB, SIZE, Content, fill, machine, make_chain, run
from rig.pulls import views

import qmpmerge
from qmpmerge.errors import LiveOnly

NAMES = ["base.raw", "a.qcow2", "b.qcow2", "c.qcow2"]

HELD: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "middle": (("commit", "--top", "[3]"), ["base.raw", "c.qcow2"]),
    "whole": (("pull",), ["c.qcow2"]),
    "partial": (("pull", "--base", "[2]"), ["base.raw", "a.qcow2", "c.qcow2"]),
    "below": (("pull", "--top", "[3]"), ["b.qcow2", "c.qcow2"]),
}
"""What is held, and the chain once somebody has gone on with it."""

ALL = pytest.mark.parametrize("what", HELD)


def hold(setup: Setup, what: str, *more: str) -> Run:
    verb, *words = HELD[what][0]
    held = invoke(verb, setup.machine.target, setup.disk, *words, "--hold", *more, "--json")
    assert (held.code, held.document["verdict"], held.document["job"]["status"]) == (0, "held", "pending"), held
    return held


def again(setup: Setup, what: str, *more: str) -> Run:
    verb, *words = HELD[what][0]
    return invoke(verb, setup.machine.target, setup.disk, *words, *more, "--json")


def ways_on(held: Run) -> dict[str, str]:
    """The commands that it names, by their verbs."""
    named = [command for hint in held.document["hints"] for command in re.findall(r"`(qmpmerge job [^`]*)`", hint)]
    return {command.rpartition(" ")[2]: command for command in named}


def chain(setup: Setup) -> list[str]:
    told = invoke("chain", setup.machine.target, setup.disk, "--json").document
    return [Path(image["file"]).name for image in told["images"]]


def left_over(folder: Path) -> list[str]:
    """Files of ours, but for the notes that are to stay."""
    files = (file.name for file in folder.iterdir() if "qmpmerge" in file.name)
    return [name for name in files if not name.endswith(("-pulled", "-stashed"))]


@pytest.mark.parametrize(
    ("what", "kind"), [*((what, "drive") for what in HELD), ("middle", "blockdev"), ("below", "blockdev")]
)
def test_held_and_gone_on_with(what: str, kind: str, tmp_path: Path, images: list[Path], content: Content) -> None:
    """The guest writes all the while; what is held is shown as that; and once more the same holds it again."""
    before = views(images[:3])
    with KINDS[kind](tmp_path, images, content) as setup:
        held = hold(setup, what)
        assert [Path(file).name for file in held.document["after"]] == chain(setup) == NAMES
        assert (held.document["merged"], held.document["copied"] > 0) == ([], True)
        assert ("to build on" in " ".join(held.document["hints"])) == (what == "middle"), (
            "a pull changes no image below"
        )
        setup.write(0x71, 3 * MIB, MIB)
        setup.check()
        (found,) = advice.findings(setup.machine.target)
        assert (found["name"], found["severity"]) == ("job-pending", "care") and "nothing is switched" in found["why"]
        assert ("to build on" in found["why"]) == (what == "middle")
        (job,) = invoke("jobs", setup.machine.target, "--json").document["jobs"]
        assert job == held.document["job"] and job["verbs"] == ["follow", "finalize", "cancel"]
        assert hold(setup, what).document["job"] == job
        setup.write(0x72, 4 * MIB, MIB)
        assert advice.typed(ways_on(held)["follow"]).returncode == 0
        setup.check()
        assert (chain(setup), invoke("jobs", setup.machine.target, "--json").document["jobs"]) == (HELD[what][1], [])
        setup.off()
    content.check(images[3])
    assert what == "middle" or views(images[:3]) == before, "a pull changes what no image below shows"
    assert left_over(tmp_path) == []


@ALL
def test_held_and_taken_back(what: str, setup: Setup, images: list[Path], content: Content) -> None:
    """The old chain is what it was, nothing is left, and the same can be begun once more."""
    held = hold(setup, what, "--merged-files", "keep")
    assert invoke("snapshot", setup.machine.target, f"{setup.disk}={setup.machine.folder}/d.qcow2").code == 3
    assert advice.typed(ways_on(held)["cancel"]).returncode == 0
    setup.write(0x73, 2 * MIB, MIB)
    assert (chain(setup), advice.names(setup.machine.target) - {"unfinished"}) == (NAMES, set())
    assert [name for name in left_over(setup.machine.folder) if not name.endswith("-lock")] == []
    assert (again(setup, what).code, chain(setup)) == (0, HELD[what][1])
    setup.check()
    setup.off()
    content.check(images[3])


@ALL
def test_a_qemu_that_dies_while_it_is_held(what: str, tmp_path: Path, images: list[Path], content: Content) -> None:
    """What was copied is nothing yet: `recover` says so, and the VM starts from where it was."""
    with drive(tmp_path, images, content) as setup:
        hold(setup, what)
        told = invoke("recover", str(images[3]), "--json").document
        assert (told["verdict"], told["merges"][0]["start_from"]) == ("running", str(images[3]))
        setup.write(0x74, MIB, MIB)
        setup.machine.io(setup.disk, "flush")
        setup.machine.kill()
    told = invoke("recover", str(images[3]), "--json").document
    assert (told["verdict"], told["merges"][0]["start_from"]) == ("done", str(images[3]))
    assert run("qemu-img", "check", "-q", "-r", "leaks", images[3]) == ""
    content.check(images[3])
    with drive(tmp_path, images, content) as setup:
        assert (again(setup, what).code, chain(setup)) == (0, HELD[what][1])
        setup.check()
        setup.off()
    content.check(images[3])


def test_an_active_merge_is_held_too(setup: Setup, images: list[Path], content: Content) -> None:
    """Where it is ready, by the same option, and by the name that virsh has for it."""
    for option in ("--hold", "--wait-ready"):
        told = invoke("commit", setup.machine.target, option, "--json")
        assert (told.code, told.document["verdict"], told.document["job"]["status"]) == (0, "ready", "ready")
        setup.write(0x75, 5 * MIB, MIB)
    held = invoke("job", setup.machine.target, JOB, "follow", "--hold", "--json")
    assert any("to build on without it; nor is" in hint for hint in held.document["hints"])
    assert "to build on" in advice.findings(setup.machine.target)[0]["why"]
    assert advice.typed(ways_on(held)["pivot"]).returncode == 0
    assert chain(setup) == ["base.raw"]
    setup.check()
    setup.off()
    content.check(images[0])


@pytest.mark.parametrize("use", ["base", "top"])
def test_an_active_merge_that_somebody_else_may_have_pivoted(
    use: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    """QEMU died before anybody looked: base alone has what the guest wrote since, or has it only as far as it was copied."""
    with drive(tmp_path, images, content) as setup:
        assert invoke("commit", setup.machine.target, "--hold").code == 0
        if use == "base":
            setup.machine.session.execute("job-complete", id=JOB)
            setup.machine.wait_for_job("concluded")
            setup.machine.session.execute("job-dismiss", id=JOB)
        else:
            setup.machine.session.execute("job-pause", id=JOB)
            setup.machine.wait_for_job("standby")
        setup.write(0x77, 3 * MIB, MIB)
        setup.machine.io(setup.disk, "flush")
        setup.machine.kill()
    for command in ("recover", "active"):
        assert invoke(command, str(tmp_path)).code == 6
    asked = invoke("recover", str(tmp_path), "--json").document["error"]
    assert (asked["name"], asked["facts"]["choices"]) == ("undecided", ["base", "top"])
    told = invoke("recover", str(images[3]), "--use", use, "--json").document
    assert (told["verdict"], told["merges"][0]["start_from"]) == ("done", str(images[0 if use == "base" else 3]))
    assert invoke("active", str(images[0])).out == f"{told['merges'][0]['start_from']}\n"
    content.check(Path(told["merges"][0]["start_from"]))


def test_an_active_merge_that_is_held_and_dies(tmp_path: Path, images: list[Path], content: Content) -> None:
    """With both equal: whoever may have moved the guest, nothing is asked."""
    with drive(tmp_path, images, content) as setup:
        assert invoke("commit", setup.machine.target, "--hold").code == 0
        setup.machine.kill()
    told = invoke("recover", str(images[3]), "--json").document
    assert (told["verdict"], told["merges"][0]["start_from"]) == ("done", str(images[3]))
    content.check(images[3])


# --- gone on with: nothing is taken on trust ------------------------------------------------------------------------------


def test_what_has_changed_while_it_was_held_is_seen(setup: Setup, images: list[Path], content: Content) -> None:
    """It was compared before it was held, and is compared again."""
    assert hold(setup, "middle").document["verified"]
    with images[0].open("r+b") as base:
        base.seek(2 * MIB)
        base.write(b"changed")
    gone_on = again(setup, "middle")
    assert (gone_on.code, gone_on.document["error"]["name"]) == (5, "not-verified")
    assert (chain(setup), setup.machine.session.execute("query-jobs")) == (NAMES, [])
    setup.check()


@pytest.mark.parametrize("verb", ["commit", "follow", "pivot"])
def test_an_active_image_whose_name_was_given_away_is_refused(verb: str, setup: Setup, images: list[Path]) -> None:
    """And the job stays held: what was copied in a night is not taken back for what a `mv` puts right."""
    command = ["commit", setup.machine.target, "--json"]
    assert invoke(*command, "--hold").code == 0
    held = setup.machine.session.execute("query-jobs")
    images[3].rename(images[3].with_name("moved"))
    shutil.copy(images[3].with_name("moved"), images[3])
    gone_on = invoke(*(command if verb == "commit" else ["job", setup.machine.target, "vda", verb, "--json"]))
    assert (gone_on.code, gone_on.document["error"]["name"]) == (3, "replaced"), gone_on
    assert setup.machine.session.execute("query-jobs") == held
    cure = re.findall("`([^`]+)`", gone_on.document["error"]["hint"])
    assert [subprocess.run(shlex.split(line), check=True) for line in cure]
    assert invoke(*command).code == 0
    setup.check()


@pytest.mark.parametrize("what", ["active", "middle", "pull"])
def test_a_base_that_was_cut_off_is_seen(what: str, setup: Setup, images: list[Path], content: Content) -> None:
    """The next start would have a smaller disk. So does one see who proves what another has ended."""
    words = {"active": ["commit"], "middle": ["commit", "--top", "[3]"], "pull": ["pull", "--base", "[1]"]}[what]
    command = [words[0], setup.machine.target, *words[1:], "--json"]
    assert invoke(*command, "--hold").code == 0
    lost = cut_off(images[0])
    gone_on = invoke(*command)
    assert (gone_on.code, gone_on.document["error"]["name"]) == (5, "cut-short"), gone_on
    assert (chain(setup), setup.machine.session.execute("query-jobs")) == (NAMES, [])
    (cure,) = re.findall("`([^`]+)`", gone_on.document["error"]["hint"])
    subprocess.run(shlex.split(cure), check=True)
    put_back(images[0], lost)
    if what == "active":
        assert invoke(*command, "--hold").code == 0
        setup.machine.session.execute("job-complete", id=JOB)
        setup.machine.wait_for_job("concluded")
        lost = cut_off(images[0])
        proved = invoke(*command)
        assert (proved.code, proved.document["error"]["name"]) == (6, "not-proven"), proved
        put_back(images[0], lost)
    assert invoke(*command).code == 0
    setup.machine.stop()  # QEMU 11 has looked at the length when the job was taken back, and reads zeros from there on
    content.check(images[0] if what == "active" else images[3])


def cut_off(image: Path) -> bytes:
    """The half that it had behind that."""
    lost = image.read_bytes()[SIZE // 2 :]
    os.truncate(image, SIZE // 2)
    return lost


def put_back(image: Path, lost: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(lost)


def test_an_image_that_cannot_be_made_durable_any_more(tmp_path: Path, images: list[Path], content: Content) -> None:
    """It was made durable before it was held, and is again before the switch. What the guest reads breaks the storage here."""
    breaks = "set-state.0.event=read_aio,set-state.0.state=1,set-state.0.new_state=2,"
    broken = (
        "inject-error.0.event=flush_to_os,inject-error.0.state=2,inject-error.0.iotype=flush,inject-error.0.errno=5"
    )
    with machine(tmp_path, *faults.injecting(images, "c", breaks + broken)) as vm:
        setup = Setup(vm, "disk0", content, lambda command: vm.io(BACKEND, command))
        hold(setup, "whole")
        setup.check()
        setup.write(0x76, MIB, MIB)
        gone_on = again(setup, "whole")
        assert (gone_on.code, gone_on.document["error"]["name"]) == (5, "not-durable"), gone_on.out
        assert (chain(setup), vm.session.execute("query-jobs")) == (NAMES, [])


def test_what_becomes_of_the_files_was_said_when_it_was_held(setup: Setup, images: list[Path]) -> None:
    """To delete them they must be compared, which they are when it goes on."""
    held = hold(setup, "middle", "--merged-files", "delete")
    gone_on = invoke("job", setup.machine.target, setup.disk, "follow", "--json").document
    assert (gone_on["verdict"], gone_on["verified"], held.document["verified"]) == ("merged", True, True)
    assert [(one["action"], one["now"]) for one in gone_on["merged"]] == [("delete", None)] * 2
    assert not images[1].exists() and not images[2].exists()


# --- the other options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["middle", "whole"])
def test_left_on_the_way_it_is_held_by_who_follows_it(what: str, setup: Setup) -> None:
    """As the command says that it prints; by then the limit is lifted, which holds nobody up here."""
    verb, *words = HELD[what][0]
    detached = invoke(verb, setup.machine.target, *words, "--hold", "--detach", "--speed", "1", "--json")
    left = invoke(verb, setup.machine.target, *words, "--hold", "--timeout", "1s", "--json")
    assert [one.document["verdict"] for one in (detached, left)] == ["running"] * 2
    (follow,) = re.findall(r"`(qmpmerge job [^`]* follow --hold)`", left.document["error"]["hint"])
    (job,) = invoke("jobs", setup.machine.target, "--json").document["jobs"]
    assert invoke("job", setup.machine.target, job["id"], "speed", "0").code == 0
    held = advice.typed(f"{follow} --polite --json")
    assert (held.returncode, json.loads(held.stdout)["verdict"]) == (0, "held")
    assert (chain(setup), again(setup, what, "--polite").code, chain(setup)) == (NAMES, 0, HELD[what][1])


@pytest.mark.parametrize("options", [(), ("--top", "[3]")])
async def test_offline_nothing_is_held(options: tuple[str, ...], images: list[Path], content: Content) -> None:
    refused = invoke("commit", str(images[3]), *options, "--hold", "--json").document["error"]
    assert (refused["name"], refused["hint"]) == (
        "live-only",
        "leave it out, and run it when the chain may change: it copies and switches at once",
    )
    async with qmpmerge.offline(images[3]) as target:
        with pytest.raises(LiveOnly, match="--hold"):
            await qmpmerge.pull(target, hold=True)
    content.check(images[3])


def test_a_dry_run_shows_the_chain_that_stays(setup: Setup) -> None:
    planned = invoke("pull", setup.machine.target, "--hold", "--dry-run", "--json").document
    assert (planned["verdict"], planned["after"]) == ("planned", planned["before"])
    assert setup.machine.session.execute("query-jobs") == []


def test_two_disks_are_held_at_a_time(tmp_path: Path) -> None:
    """Of one VM; each goes on by itself, and `tidy`, which is asked for the very same, goes on with what is held."""
    arguments: list[str] = []
    chains = {}
    for disk in ("vda", "vdb"):
        (folder := tmp_path / disk).mkdir()
        chains[disk] = make_chain(folder), Content()
        fill(*chains[disk])
        arguments += ["-drive", f"file={folder / 'c.qcow2'},format=qcow2,if=none,id={disk}"]
        arguments += ["-device", f"virtio-blk-pci,drive={disk}"]
    with machine(tmp_path, *arguments) as vm:
        for disk in chains:
            held = invoke("commit", vm.target, disk, "--keep", "1", "--hold", "--json").document
            assert held["verdict"] == "held", held
        done = invoke("tidy", vm.target, "--keep", "1", "--json").document
        assert [one["verdict"] for one in done["tidied"]] == ["merged", "merged"], done
        vm.stop()
    for images, content in chains.values():
        content.check(images[3])
