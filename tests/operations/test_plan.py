"""
Both ways to a shorter chain, side by side; and wherever one of them is refused or planned, the command for the other, typed.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rig.advice import typed
from rig.command import invoke
from rig.disks import WAYS, Images, Setup, device, drive, form
from rig.faults import digests
from rig.machines import MIB, Content, fill, machine, run
from rig.terminal import on_terminal, plain

import qmpmerge
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.chain.outcome import Estimate
from qmpmerge.errors import BaseIsTop, OptionsConflict
from qmpmerge.operations.plan import choose


def view(image: Path) -> str:
    """What an image shows, by itself and what it is built on."""
    shown = image.with_name("view")
    run("qemu-img", "convert", "-U", "-f", form(image), "-O", "raw", image, shown)
    seen = hashlib.sha256(shown.read_bytes()).hexdigest()
    shown.unlink()
    return seen


def named(setup: Setup) -> str:
    """TARGET."""
    return setup.active if isinstance(setup, Images) else setup.machine.target


def carried_out(command: str) -> Any:
    """The object that comes of a command of ours, typed as it is printed."""
    done = typed(f"{command} --json")
    assert done.returncode == 0, done
    return json.loads(done.stdout)


def chain(folder: Path, names: Sequence[str], *options: str) -> list[Path]:
    """A chain with absolute names."""
    images = [folder / name for name in names]
    more = [word for option in options for word in ("-o", option)]
    run("qemu-img", "create", "-qf", form(images[0]), *more, images[0], str(8 * MIB))
    for below, image in itertools.pairwise(images):
        run("qemu-img", "create", "-qf", "qcow2", *more, "-b", below, "-F", form(below), image)
    return images


# --- what a refusal offers instead ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [("drive", []), ("blockdev", ["--top", "3"]), ("offline", ["--top", "3"]), ("offline", ["--shallow"])],
)
def test_the_pull_that_dependents_names_is_made(
    kind: str, options: Sequence[str], tmp_path: Path, images: list[Path], content: Content
) -> None:
    other = tmp_path / "other.qcow2"
    run("qemu-img", "create", "-qf", "qcow2", "-b", "b.qcow2", "-F", "qcow2", other)
    before = view(other)
    with WAYS[kind](tmp_path, images, content) as setup:
        error = invoke("commit", named(setup), *options, "--json").document["error"]
        assert error["name"] == "dependents"
        assert f"`{error['facts']['pull']}` shortens" in error["hint"]
        pulled = carried_out(error["facts"]["pull"])
        assert pulled["verdict"] == "pulled" and len(pulled["after"]) < 4
        setup.check()
        setup.off()
    assert view(other) == before
    content.check(images[3])


@pytest.mark.parametrize(("kind", "depth"), [("drive", 3), ("offline", 2), ("offline", 3)])
def test_the_pull_that_shared_base_names_is_made(kind: str, depth: int, tmp_path: Path) -> None:
    """It keeps the golden image, unless there is nothing else to be pulled."""
    names = ["golden.raw", "vm/a.qcow2", "vm/b.qcow2"][:depth]
    (tmp_path / "vm").mkdir()
    images, content = chain(tmp_path, names), Content()
    fill(images, content)
    before = view(images[0])
    allow = ["--allow", str(images[0])] if kind == "offline" else []
    with WAYS[kind](tmp_path, images, content) as setup:
        error = invoke("commit", named(setup), *allow, "--json").document["error"]
        assert error["name"] == "shared-base"
        pulled = carried_out(error["facts"]["pull"])
        assert pulled["after"] == [str(image) for image in ([images[-1]] if depth == 2 else [images[0], images[-1]])]
        setup.check()
        setup.off()
    assert view(images[0]) == before


# --- what a dry run names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "after"),
    [
        (["commit"], ["c.qcow2"]),
        (["commit", "--top", "3"], ["base.raw", "c.qcow2"]),
        (["pull", "--base", "1"], ["base.raw", "a.qcow2"]),
    ],
)
def test_a_dry_run_names_the_other_way(words: list[str], after: list[str], setup: Setup) -> None:
    command, *options = words
    planned = invoke(command, named(setup), "vda", *options, "--dry-run", "--json").document
    other = planned["other_way"]
    (line,) = [
        line
        for line in invoke(command, named(setup), "vda", *options, "--dry-run").out.splitlines()
        if line.startswith("  or      ")
    ]
    assert other["run"] in line
    foreseen = json.loads(typed(f"{other['run']} --dry-run --json").stdout)
    assert [Path(file).name for file in foreseen["after"]] == after
    assert (foreseen["estimate"]["copy"], foreseen["estimate"]["file"]) == (other["copy"], other["file"])
    assert (" as well" if other["copy"] == planned["estimate"]["copy"] else " instead of ") in line
    assert len(
        carried_out(other["run"] + (" --yes" if other["run"].startswith("qmpmerge commit") else ""))["after"]
    ) == len(planned["after"])


def test_a_golden_base_is_no_reason_to_be_sent_to_commit(tmp_path: Path) -> None:
    """It lies in another folder, so others may be built on it: `commit` is refused."""
    images = chain(tmp_path, ["gold.qcow2"])
    (tmp_path / "vm").mkdir()
    top = tmp_path / "vm/top.qcow2"
    run("qemu-img", "create", "-qf", "qcow2", "-b", images[0], "-F", "qcow2", top)
    planned = invoke("pull", str(top), "--allow", str(tmp_path), "--dry-run", "--json").document
    assert (planned["verdict"], planned["other_way"]) == ("planned", None)


def test_a_way_that_is_refused_is_not_named(tmp_path: Path) -> None:
    """Behind the end of the short one a merge would show what the base holds."""
    images = chain(tmp_path, ["low.qcow2", "mid.qcow2", "top.qcow2"])
    run("qemu-img", "resize", "-q", "--shrink", images[1], "4M")
    planned = invoke("pull", str(images[2]), "--dry-run", "--json").document
    assert (planned["verdict"], planned["other_way"]) == ("planned", None)


# --- both side by side ------------------------------------------------------------------------------------------------


async def planned(setup: Setup, **options: Any) -> qmpmerge.Ways:
    async with setup.target() as target:
        return await qmpmerge.plan(target, setup.disk, **options)


@pytest.mark.parametrize("kind", ["drive", "offline"])
async def test_each_way_is_what_its_dry_run_tells_and_its_command_does(
    kind: str, tmp_path: Path, images: list[Path], content: Content
) -> None:
    before = digests(tmp_path)
    with WAYS[kind](tmp_path, images, content) as setup:
        found = await planned(setup)
        assert digests(tmp_path) == before
        down, up = found.ways
        assert (down.direction, str(down.after), down.start_from) == ("commit", "base.raw", str(images[0]))
        assert (up.direction, str(up.after), up.start_from) == ("pull", "c.qcow2", str(images[3]))
        assert (down.keeps_launch_path, up.keeps_launch_path) == (False, True)
        assert (down.pauses_guest, up.pauses_guest) == (kind == "drive", False)
        for way in found.ways:
            told = json.loads(typed(f"{way.run} --dry-run --json").stdout)
            estimate = {key: value for key, value in told["estimate"].items() if key not in ("free", "reason")}
            assert estimate == {key: getattr(way.estimate, key) for key in estimate}
            assert [check["name"] for check in told["checks"]] == [check.name for check in way.checks]
        assert (found.choice, found.shared, found.not_seen) == ("pull", (), ())
        assert carried_out(up.run)["after"] == [str(images[3])]
        setup.check()
        setup.off()
    content.check(images[3])


async def test_what_keep_leaves_is_planned_both_ways(tmp_path: Path, images: list[Path], content: Content) -> None:
    """As `commit` and `tidy` with `--keep` have it; the commands name the layers."""
    with drive(tmp_path, images, content) as setup:
        shown = invoke("plan", setup.machine.target, "vda", "--keep", "1", "--json").document
        before = [str(image) for image in images]
        assert [way["after"] for way in shown["ways"]] == [[before[0], before[3]]] * 2
        found = await planned(setup, keep=0)
        assert [str(way.after) for way in found.ways] == ["base.raw", "c.qcow2"]
        assert (await planned(setup, keep=3)).verdict == "unchanged"
        with pytest.raises(OptionsConflict):
            await planned(setup, keep=1, shallow=True)
        committed = carried_out(shown["ways"][0]["run"])
        assert (committed["verdict"], committed["after"]) == ("merged", [before[0], before[3]])
        setup.check()


async def test_a_golden_base_that_another_vm_runs_on_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    images, content = chain(tmp_path, ["golden.raw", "vm/a.qcow2", "vm/b.qcow2"]), Content()
    fill(images, content)
    other = tmp_path / "other.qcow2"
    run("qemu-img", "create", "-qf", "qcow2", "-b", images[0], "-F", "raw", other)
    (tmp_path / "second").mkdir()
    theirs = ["-name", "second", "-drive", f"file={other},if=none,id=vda", *device("vda")]
    with machine(tmp_path / "second", *theirs) as second, drive(tmp_path, images, content) as setup:
        found = await planned(setup)
        assert {(one.file, one.kind) for one in found.shared} == {
            (str(images[0]), kind) for kind in ("image", "process")
        }
        assert {one.name for one in found.shared} >= {str(other)}
        assert [error.name for error in found.ways[0].refusals] == ["in-use", "dependents", "shared-base"]
        assert (found.choice, found.reason) == ("pull", "commit is refused (in-use, dependents, shared-base)")
        forced = await planned(setup, base=1, force=["in-use", "dependents"])
        assert (forced.ways[0].refusals, forced.choice) == ((), "pull")
        assert "others need" in forced.reason
        above = await planned(setup, base=2)
        assert [str(way.after) for way in above.ways] == ["golden.raw <-- a.qcow2", "golden.raw <-- b.qcow2"]
        assert not above.shared and not above.ways[0].refusals
        pulled = carried_out(found.ways[1].run)
        assert (pulled["verdict"], second.process.poll()) == ("pulled", None)
        setup.check()
        setup.off()
    content.check(images[2])


def test_what_is_shown_fits_a_terminal(setup: Setup, tmp_path: Path) -> None:
    run("qemu-img", "create", "-qf", "qcow2", "-b", "base.raw", "-F", "raw", tmp_path / "other.qcow2")
    with on_terminal("plan", named(setup), "vda", "--speed", "1M") as seen:
        shown = plain(seen.end().out).splitlines()
    table, rest = shown[1:10], shown[10:]
    assert max(map(len, table)) <= 80
    assert [line.split("  ")[0] for line in table] == [
        *("WAY", "after", "copies", "takes", "grows", "free", "guest", "start from", "refused")
    ]
    assert table[-1].split() == ["refused", "dependents", "no"]
    assert rest[0] == "time        at 1 MiB/s (as given)"
    answer = " ".join(" ".join(rest).split())  # long lines are broken on a terminal
    assert answer.endswith(
        "take pull: commit is refused (dependents) "
        f"commit qmpmerge commit {named(setup)} vda --speed {MIB} "
        f"pull qmpmerge pull {named(setup)} vda --speed {MIB}"
    )


async def test_nothing_to_merge(tmp_path: Path) -> None:
    (image,) = chain(tmp_path, ["one.qcow2"])
    async with qmpmerge.open(image) as target:
        found = await qmpmerge.plan(target)
    assert (found.verdict, found.ways, found.choice) == ("unchanged", (), None)


def test_what_was_typed_is_in_both_commands(images: list[Path], content: Content, tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    options = ["--search", str(tmp_path / "else"), "--force", "would-lose", "--force", "no-space", "--format", "qcow2"]
    told = invoke("plan", str(images[3]), "--top", "3", *options, "--json").document
    search = f"--format qcow2 --search {tmp_path}/else"
    assert [way["run"] for way in told["ways"]] == [
        f"qmpmerge commit {images[3]} --top 3 {search} --force no-space --force would-lose",
        f"qmpmerge pull {images[3]} --base 1 {search} --force no-space --force would-lose",
    ]
    assert all(typed(f"{way['run']} --dry-run").returncode == 0 for way in told["ways"])


# --- which ------------------------------------------------------------------------------------------------------------


def way(direction: Any, copy: int | None, *, keeps: bool = True, refused: bool = False) -> qmpmerge.Way:
    one = Chain((Image("/vm/a", "qcow2", 1),))
    refusals = (BaseIsTop(base="/vm/a"),) if refused else ()
    return qmpmerge.Way(direction, "", one, Estimate(copy=copy), False, "/vm/a", keeps, refusals=refusals)


@pytest.mark.parametrize(
    ("down", "up", "more", "choice"),
    [
        ({"copy": 1, "refused": True}, {"copy": 9, "refused": True}, {}, None),
        ({"copy": 1, "refused": True}, {"copy": 9}, {}, "pull"),
        ({"copy": 9}, {"copy": 1, "refused": True}, {"is_shared": True}, "commit"),
        ({"copy": 1}, {"copy": 9}, {"is_shared": True}, "pull"),
        ({"copy": 1}, {"copy": 9}, {"is_seen": False}, "pull"),
        ({"copy": 1, "keeps": False}, {"copy": 9}, {}, "commit"),
        ({"copy": 9}, {"copy": 1}, {}, "pull"),
        ({"copy": 95, "keeps": False}, {"copy": 100}, {}, "pull"),
        ({"copy": 100}, {"copy": 95}, {}, "commit"),
        ({"copy": None, "keeps": False}, {"copy": 1}, {}, "pull"),
    ],
)
def test_the_rule(down: Any, up: Any, more: Any, choice: str | None) -> None:
    given = {"is_shared": False, "is_seen": True, **more}
    chosen, reason = choose(way("commit", **down), way("pull", **up), **given)
    assert chosen == choice and reason


# --- by how much it grows ---------------------------------------------------------------------------------------------


def clusters(image: Path, size: int) -> int:
    """Bytes of the clusters of data that the image has itself."""
    found = json.loads(run("qemu-img", "map", "-U", "--output=json", "-f", "qcow2", image))
    held = [one for one in found if one["depth"] == 0 and one["data"]]
    touched = {
        number for one in held for number in range(one["start"] // size, -(-(one["start"] + one["length"]) // size))
    }
    return len(touched) * size


WRITES = (
    ("write -P 1 0 1M", "write -P 1 6M 64k"),
    ("write -P 2 512k 1M", "write -P 2 3M 4k", "write -P 2 5M 100k", "write -c -P 2 6M {cluster}"),
    ("write -P 3 2M 300k", "write -z 5M 64k"),
    ("write -P 4 2100k 512k", "discard 3M 64k"),
)
"""Of four layers: data over data, a part of a cluster, compressed, zeros over data, and what was discarded in the top."""

RANGES = [
    ["pull"],
    ["pull", "--base", "1"],
    ["pull", "--base", "2"],
    ["commit"],
    ["commit", "--top", "3"],
    ["commit", "--shallow"],
]


@pytest.mark.parametrize("cluster", [64 * 1024, 2 * MIB])
@pytest.mark.parametrize("words", RANGES, ids=" ".join)
def test_the_clusters_that_are_written_are_those_foreseen(words: list[str], cluster: int, tmp_path: Path) -> None:
    """Exactly; where any are, two more are foreseen for reference counts."""
    images = chain(tmp_path, ["l0.qcow2", "l1.qcow2", "l2.qcow2", "l3.qcow2"], f"cluster_size={cluster}")
    for image, writes in zip(images, WRITES, strict=True):
        commands = [word for write in writes for word in ("-c", write.format(cluster=cluster))]
        run("qemu-io", "-f", "qcow2", "-d", "unmap", *commands, image)
    command, *options = words
    told = invoke(command, str(images[3]), *options, "--dry-run", "--json").document["estimate"]
    before = clusters(Path(told["file"]), cluster)
    assert invoke(command, str(images[3]), *options).code == 0
    grown = clusters(Path(told["file"]), cluster) - before
    assert told["growth"] == (grown + 2 * cluster if grown else 0)
