"""Lines that fail, and the lines that are told instead: each is what it says, and does its work when it is typed."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from rig.command import JOB, Run, attempt, invoke
from rig.disks import Setup, device
from rig.machines import machine, make_chain

from qmpmerge.cli import words
from qmpmerge.cli.commands.group import FILES, cli
from qmpmerge.cli.elsewhere import COMMANDS


@pytest.fixture
def vm1(tmp_path: Path, images: list[Path]) -> Iterator[str]:
    """The name of a VM with a disk vda."""
    name = f"Web-{os.getpid()}"
    with machine(tmp_path, "-name", name, "-drive", f"file={images[3]},if=none,id=vda", *device("vda")):
        yield name


def lines(run: Run) -> list[list[str]]:
    """The lines that the hint tells to type."""
    (hint,) = re.findall(r"^hint: (.*)$", run.err, re.MULTILINE)
    return [shlex.split(told)[1:] for told in re.findall(r"`(qmpmerge [^`]*)`", hint)]


def typed(run: Run) -> Run:
    """The line that is told, typed into a shell."""
    (hint,) = re.findall(r"^hint: (.*)$", run.err, re.MULTILINE)
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    (line,) = re.findall(r"`(qmpmerge [^`]*)`", hint)
    done = subprocess.run(
        ["sh", "-c", line], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    return Run(done.returncode, done.stdout, done.stderr)


# --- help and version ---------------------------------------------------------------------------------------------


def test_version_and_help_as_other_tools_have_them() -> None:
    assert invoke("version").out == invoke("-V").out == invoke("--version").out
    assert invoke("help").out == invoke("help", "help").out == invoke("--help").out
    assert (invoke("help", "commit").code, invoke("help", "commit").out) == (0, invoke("commit", "--help").out)


@pytest.mark.parametrize(
    ("line", "same"),
    [
        *((line, "--version") for line in ("version --json", "--version --json", "-V --json", "--json --version")),
        *((line, "--help") for line in ("help --json", "--help --json", "-h --json", "help help --json")),
        *((line, "commit --help") for line in ("help commit --json", "commit -h --json", "commit --json --help")),
        ("completion bash --json", "completion bash"),
    ],
)
def test_what_is_text_is_so_with_json_too(line: str, same: str, tmp_path: Path) -> None:
    shown = attempt(*line.split(), cwd=tmp_path)
    assert (shown.code, shown.out, shown.err) == (0, attempt(*same.split(), cwd=tmp_path).out, "")


# --- other tools' commands ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("list", "vms"),
        ("list vm1", "disks vm1"),
        ("domblklist vm1", "disks vm1"),
        ("info /vm/c.qcow2", "chain /vm/c.qcow2"),
        ("backing-chain vm1 vda", "chain vm1 vda"),
        ("status vm1", "jobs vm1"),
        ("merge vm1 vda --top 3", "commit vm1 vda --top 3"),
        ("blockcommit vm1 vda", "commit vm1 vda"),
        ("blockcommit --domain vm1 --path vda --active --wait --verbose --pivot", "commit vm1 vda --pivot"),
        ("blockcommit vm1 vda --active --wait", "commit vm1 vda --wait-ready"),
        ("blockcommit vm1 vda --bandwidth=50 --delete", "commit vm1 vda --speed 50M --merged-files delete"),
        ("blockjob vm1 vda --info", "jobs vm1"),
        ("blockjob vm1 vda --abort", "job vm1 vda cancel"),
        ("blockjob vm1 vda --pivot", "job vm1 vda pivot"),
        ("blockjob vm1 vda --bandwidth 5", "job vm1 vda speed 5M"),
        ("follow vm1 vda", "job vm1 vda follow"),
        ("speed vm1 vda 5M", "job vm1 vda speed 5M"),
        (
            "snapshot-create-as vm1 --disk-only --diskspec vda,file=/vm/d.qcow2,snapshot=external --atomic",
            "snapshot vm1 vda=/vm/d.qcow2",
        ),
        (
            "snapshot-create-as vm1 --disk-only --diskspec vda,file=/vm/d.qcow2 --reuse-external --quiesce",
            "snapshot vm1 vda=/vm/d.qcow2 --reuse --quiesce",
        ),
        ("blockpull vm1 vda --base b --wait --verbose", "pull vm1 vda --base b"),
        ("rebase -b base.raw c.qcow2", "pull --base base.raw c.qcow2"),
        ("rebase -b '' c.qcow2", "pull c.qcow2"),
        ("info --backing-chain -U c.qcow2", "chain c.qcow2"),
        ("info --output=json c.qcow2", "chain --json c.qcow2"),
        ("comit vm1 'a b'", "commit vm1 'a b'"),
        ("Chain vm1", "chain vm1"),
        ("vm", "vms"),
        ("blokcommit vm1 vda", "commit vm1 vda"),
        ("merge", "commit --help"),
        ("blockcommit vm1 vda --nonsense", "commit --help"),
        ("help merge", "commit --help"),
        ("help comit", "commit --help"),
    ],
)
def test_what_is_called_otherwise_elsewhere(line: str, meant: str, tmp_path: Path) -> None:
    run = attempt(*shlex.split(line), cwd=tmp_path)
    assert run.code == 2
    assert lines(run) == [shlex.split(meant)], run.err


def test_all_names_of_other_tools_lead_to_a_command_of_ours() -> None:
    for ours, others in COMMANDS.items():
        assert set(FILES).isdisjoint(others)
        for other in others:
            told = words.hint(click.UsageError("", click.Context(cli)), [other]) or ""
            assert "`qmpmerge vms`" in told or re.search(r"`qmpmerge (\w+) --help`", told), (ours, other, told)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("blockcopy vm1 vda /tmp/x", "nothing like it here"),
        ("convert a.qcow2 b.qcow2", "nothing like it here"),
        *(
            (f"{line} vm1", "move that file away, then start the VM")
            for line in ("snapshot-revert", "rollback", "undo")
        ),
        ("delsnapshot 100 snap", "`qmpmerge commit --help`"),
        ("rebase -u -b base.raw c.qcow2", "moves no data"),
        ("snapshot -c s1 c.qcow2", "`qemu-img snapshot`"),
    ],
)
def test_what_there_is_not_is_told_as_that(line: str, said: str, tmp_path: Path) -> None:
    run = attempt(*line.split(), cwd=tmp_path)
    assert run.code == 2 and said in run.err.partition("\nhint: ")[2]
    assert "that is `qmpmerge" not in run.err


def test_what_is_only_a_little_alike_is_not_meant(tmp_path: Path) -> None:
    assert "hint" not in attempt("blockinfo", "vm1", cwd=tmp_path).err


def test_a_time_limit_of_virsh_cancels_the_job(setup: Setup) -> None:
    run = invoke("commit", setup.machine.target, "vda", "--speed", "1", "--timeout", "1", "--async")
    assert lines(run) == [["commit", setup.machine.target, "vda", "--speed", "1", "--timeout", "1"]]
    (line,) = re.findall(r"`(timeout -s INT 1 qmpmerge [^`]*)`", run.err)
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    subprocess.run(["sh", "-c", line], env={**os.environ, "PATH": path}, check=False)
    assert invoke("jobs", setup.machine.target, "--json").document["jobs"] == []
    assert len(invoke("chain", setup.machine.target, "--json").document["images"]) == 4
    assert "exit code 7" in invoke("blockcommit", "vm1", "vda", "--timeout", "10").err
    assert "exit code 7" not in invoke("comit", "vm1", "vda", "--timeout", "10").err


def test_a_hint_is_in_json_too(tmp_path: Path) -> None:
    error = attempt("blockcommit", "vm1", "--json", cwd=tmp_path).document["error"]
    assert error["hint"] == "that is `qmpmerge commit vm1 --json`"
    assert attempt("zzzzzz", "--json", cwd=tmp_path).document["error"]["hint"] == "see `qmpmerge --help`"


# --- habits of virsh --------------------------------------------------------------------------------------------------


def test_options_that_are_so_anyway_are_taken(vm1: str) -> None:
    planned = invoke("commit", vm1, "vda", "--active", "--wait", "--verbose", "--pivot", "--dry-run")
    assert (planned.code, "planned" in planned.out, "query-block" in planned.err) == (0, True, False)
    for top in ("c.qcow2", "4", "-1"):
        assert invoke("commit", vm1, "vda", "--active", "--wait-ready", "--top", top, "--dry-run").code == 0
    for option in ("--active", "--pivot"):
        below = invoke("commit", vm1, "vda", *dict.fromkeys((option, "--pivot")), "--top", "b.qcow2", "--dry-run")
        assert (below.code, f"{option} is for a merge of the active image" in below.err) == (3, True)
    assert invoke("commit", vm1, "vda", "--pivot", "--top", "c.qcow2", "--dry-run").code == 0


def test_active_alone_is_not_taken_for_a_pivot(vm1: str) -> None:
    """With virsh it leaves the guest where it is."""
    told = invoke("commit", vm1, "vda", "--active", "--wait")
    assert (told.code, "--wait-ready" in told.err, "--pivot" in told.err) == (2, True, True), told.err


def test_a_job_below_the_active_image_cannot_pivot(setup: Setup) -> None:
    target = setup.machine.target
    invoke("commit", target, "--top", "3", "--speed", "1", "--detach")
    run = invoke("job", target, "vda", "follow", "--pivot")
    assert (run.code, "--pivot is for a merge of the active image" in run.err) == (3, True)
    assert invoke("job", target, "vda", "cancel").code == 0
    invoke("commit", target, "--speed", "1", "--detach")
    invoke("job", target, "vda", "speed", "0")
    assert invoke("job", target, "vda", "follow", "--pivot").code == 0


def test_a_merge_of_the_lowest_image_needs_a_higher_top(vm1: str) -> None:
    assert "hint: name a --top further up" in invoke("commit", vm1, "--top", "1", "--dry-run").err
    assert "hint: name a base further down" in invoke("commit", vm1, "--top", "2", "--base", "2", "--dry-run").err


def test_options_that_are_called_otherwise_here(tmp_path: Path) -> None:
    run = attempt("commit", "vm1", "vda", "--bandwidth", "5", "--delete", cwd=tmp_path)
    assert lines(run) == [["commit", "vm1", "vda", "--speed", "5M", "--merged-files", "delete"]]


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("commit -f qcow2 -p -t none c.qcow2", "commit --format qcow2 c.qcow2 --shallow"),
        ("commit -d c.qcow2", "commit --merged-files keep c.qcow2 --shallow"),
        ("commit -d -b base.raw -r 10M c.qcow2", "commit --merged-files keep --base base.raw --speed 10M c.qcow2"),
        ("snapshot -l c.qcow2", "chain c.qcow2 --details"),
        ("commit vm1 vda 10 --shallow", "commit vm1 vda --shallow --speed 10M"),
        ("job vm1 vda folow", "job vm1 vda follow"),
        ("job vm1 vda abort", "job vm1 vda cancel"),
        ("job vm1 vda complete", "job vm1 vda pivot"),
        ("job vm1 cancel", "job vm1 vda cancel"),
        ("job vm1 vda speed", "job vm1 vda speed 50M"),
        ("snapshot vm1 /vm/d.qcow2", "disks vm1"),
        ("--json commit vm1", "commit vm1 --json"),
    ],
)
def test_words_that_the_command_does_not_take(line: str, meant: str, tmp_path: Path) -> None:
    run = attempt(*line.split(), cwd=tmp_path)
    told = run.document["error"]["hint"] if "--json" in line else run.err.partition("\nhint: ")[2]
    assert [shlex.split(one)[1:] for one in re.findall(r"`(qmpmerge [^`]*)`", told)] == [meant.split()], run


def test_no_line_is_told_that_has_just_failed(tmp_path: Path) -> None:
    doubled = attempt("snapshot", "vm1", "vda=/x", "vda=/y", "--dry-run", cwd=tmp_path)
    assert "vda is named twice" in doubled.err and "hint" not in doubled.err


def test_it_is_target_that_is_missing_before_the_disks(tmp_path: Path) -> None:
    assert "Missing argument 'TARGET'" in attempt("snapshot", "vda=d.qcow2", cwd=tmp_path).err
    assert "Missing argument 'DISK=FILE...'" in attempt("snapshot", "vm1", cwd=tmp_path).err


def test_options_that_no_help_shows_are_no_guess(tmp_path: Path) -> None:
    assert "Did you mean '--shallow'?" in attempt("commit", "vm1", "--shalow", cwd=tmp_path).err
    for typed in (["--path", "y"], ["--waiting"], ["--activ"]):
        assert "Did you mean" not in attempt("commit", "vm1", *typed, cwd=tmp_path).err


# --- words in the wrong order -----------------------------------------------------------------------------------------


def test_target_and_disk_swapped(vm1: str) -> None:
    run = invoke("commit", "vda", vm1, "--dry-run", "--base", "vda[1]")
    assert run.code == 4
    assert lines(run) == [["commit", vm1, "vda", "--dry-run", "--base", "vda[1]"]]
    assert "planned" in typed(run).out
    run = invoke("commit", "--base", "vda", "vda", vm1, "--dry-run")  # the first vda is no TARGET
    assert lines(run) == [["commit", "--base", "vda", vm1, "vda", "--dry-run"]]
    assert "c.qcow2" in typed(invoke("chain", "vda", vm1)).out


def test_a_monitor_in_the_place_of_a_disk(setup: Setup) -> None:
    run = invoke("chain", "vda", setup.machine.target)
    assert "c.qcow2" in typed(run).out
    facts = invoke("chain", "vda", setup.machine.target, "--json").document["error"]["facts"]
    assert facts["command"] == f"qmpmerge chain {setup.machine.target} vda --json"


def test_an_image_in_the_place_of_a_disk_may_be_one(images: list[Path]) -> None:
    assert "TARGET comes first" not in invoke("chain", "nobody", str(images[3])).err


def test_job_target_and_verb_in_any_order(setup: Setup) -> None:
    target = setup.machine.target
    invoke("commit", target, "--speed", "1", "--detach")
    for line in ([JOB, target, "pause"], ["resume", target, JOB], [target, "pause", JOB], [JOB, "resume", target]):
        done = typed(invoke("job", *line))
        assert (done.code, JOB in done.out) == (0, True), (line, done)
    assert "at most 7 B/s" in typed(invoke("job", "speed", JOB, target, "7")).out


def test_snapshots_in_any_order(tmp_path: Path) -> None:
    wanted = [["snapshot", "vm1", "vda=/vm/a b"]]
    assert lines(attempt("snapshot", "vda=/vm/a b", "vm1", cwd=tmp_path)) == wanted
    assert lines(attempt("snapshot", "vm1", "vda", "/vm/a b", cwd=tmp_path)) == wanted


def test_a_target_without_a_command(vm1: str, images: list[Path]) -> None:
    assert "vda" in typed(invoke(vm1)).out
    assert "base.raw <-- a.qcow2" in typed(invoke(vm1, "chain")).out
    assert lines(invoke(str(images[3]))) == [["chain", str(images[3])]]  # which a VM has
    assert typed(invoke(str(images[3].parent))).code == 0
    assert lines(invoke("/no/such/image.qcow2")) == [["--help"]]


def test_an_older_image_in_the_place_of_the_newest(images: list[Path]) -> None:
    refused = invoke("commit", str(images[2])).err
    line = f"qmpmerge commit {images[3]} --top {images[2]}"
    assert f"hint: `{line}` merges them below" in refused
    assert invoke(*shlex.split(line)[1:]).code == 0
    assert len(invoke("chain", str(images[3]), "--json").document["images"]) == 2
    assert "merges them below" not in invoke("commit", str(images[1]), "--top", str(images[0])).err


def test_a_disk_that_was_left_out(tmp_path: Path, images: list[Path]) -> None:
    (tmp_path / "second").mkdir()
    other = make_chain(tmp_path / "second")[3]
    drives = [f"-drive file={images[3]},if=none,id=vda", f"-drive file={other},if=none,id=vdb"]
    with machine(tmp_path, *" ".join(drives).split()) as vm:
        run = invoke("commit", vm.target, "--top", "3", "--dry-run")
        assert run.code == 3
        assert lines(run) == [["commit", vm.target, "vda", "--top", "3", "--dry-run"]]
        assert "planned" in typed(run).out


def test_one_disk_or_one_vm_where_all_are_shown(vm1: str) -> None:
    assert "base.raw <-- a.qcow2" in typed(invoke("disks", vm1, "vda")).out
    assert "c.qcow2" in typed(invoke("vms", vm1)).out


# --- another case, and slips --------------------------------------------------------------------------------------------


def test_names_in_another_case_are_told_and_not_taken(vm1: str, images: list[Path]) -> None:
    cases = [
        (["chain", vm1.upper()], 4, vm1),
        (["chain", vm1, "VDA"], 3, "vda"),
        (["commit", vm1, "--top", "B.QCOW2"], 3, "b.qcow2"),
        (["commit", vm1, "--top", str(images[2]).replace("b.qcow2", "B.qcow2")], 3, str(images[2])),
        (["commit", vm1, "--top", "VDA[2]"], 3, "'vda[2]'"),
        (["chain", vm1.replace("Web", "Wbe")], 4, vm1),
        (["chain", f"{images[3]}2".replace("c.qcow22", "c.qcow")], 4, str(images[3])),
    ]
    for line, code, meant in cases:
        run = invoke(*line)
        assert (run.code, f"did you mean `{meant}`?" in run.err) == (code, True), run.err
    assert len(invoke("chain", vm1, "--json").document["images"]) == 4


def test_a_job_is_named_by_its_disk_and_told_in_another_case(setup: Setup) -> None:
    target = setup.machine.target
    assert f"no job on disk vda of {target}\nhint: jobs there: none" in invoke("job", target, "vda", "pause").err
    assert f"no job vdz on {target}" in invoke("job", target, "vdz", "pause").err
    invoke("commit", target, "--speed", "1", "--detach")
    assert f"did you mean `{JOB}`?" in invoke("job", target, JOB.upper(), "pause").err
    for name in ("vda", "disk0"):
        said = invoke("job", target, name, "speed", "7").out
        assert said.startswith(f"{JOB}: ") and "at most 7 B/s" in said
    assert invoke("job", target, "vda", "cancel").out == f"{JOB}: cancelled\n"


# --- layers -------------------------------------------------------------------------------------------------------------


def test_layers_by_every_kind_of_word(vm1: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for top in (
        ["--top", "3"],
        ["--top", "-2"],
        ["--top=-2"],
        ["--top", "[3]"],
        ["--top=vda[-2]"],
        ["--top", "b.qcow2"],
    ):
        planned = invoke("commit", vm1, *top, "--dry-run", "--json", cwd=tmp_path / "elsewhere").document
        assert planned["after"] == [planned["before"][0], planned["before"][3]], top


def test_files_that_are_called_like_something_else(tmp_path: Path) -> None:
    """Never guessed which is meant; what is told to type means one."""
    names = ["base.raw", "-1", "2", "a[1].qcow2", "b c.qcow2"]
    for below, name in zip([None, *names], names, strict=False):
        form = "raw" if name.endswith("raw") else "qcow2"
        backing = ["-b", f"./{below}", "-F", "raw" if below.endswith("raw") else "qcow2"] if below else []
        arguments = ["create", "-q", "-f", form, *backing, f"./{name}", *([] if below else ["1M"])]
        subprocess.run(["qemu-img", *arguments], cwd=tmp_path, check=True)
    active = str(tmp_path / names[-1])
    for top in ("-1", "2"):
        run = attempt("commit", active, "--top", top, "--dry-run", "--json", cwd=tmp_path)
        assert (run.code, run.document["error"]["name"]) == (3, "ambiguous-layer")
        results = []
        for word in run.document["error"]["facts"]["words"]:
            planned = attempt("commit", active, "--top", word, "--dry-run", "--json", cwd=tmp_path)
            results.append(len(planned.document["after"]))
        assert len(set(results)) == 2
    for top, left in (("a[1].qcow2", 2), ("b c.qcow2", 1), ("./-1", 4), ("4", 2)):
        run = attempt("commit", active, "--top", top, "--dry-run", "--json", cwd=tmp_path)
        assert len(run.document["after"]) == left, top


def test_of_a_long_chain_ten_are_told(tmp_path: Path) -> None:
    images = make_chain(tmp_path, ["base.raw", *(f"snap{number}.qcow2" for number in range(1, 40))])
    run = invoke("commit", str(images[-1]), "--top", "99", "--dry-run")
    assert (run.code, "10 of its 40 images" in run.err) == (3, True)
    assert "40 " in run.err and len(run.err.splitlines()) == 2
