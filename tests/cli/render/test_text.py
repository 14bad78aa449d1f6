"""Text for people: exact lines on two fake streams, under a fake clock."""

import dataclasses
import io
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpmerge.chain.chain import Chain, Image
from qmpmerge.chain.outcome import Checked, MergedFile, Outcome
from qmpmerge.checks.check import CHECKS
from qmpmerge.cli.render import outcome
from qmpmerge.cli.render.text import TextOutput
from qmpmerge.cli.render.visible import visible
from qmpmerge.cli.render.width import width
from qmpmerge.doctor.findings import Finding, Severity
from qmpmerge.engine.pace.progress import Progress
from qmpmerge.engine.resume import Recovery
from qmpmerge.errors import Cancelled, JobVerb, NoSuchDisk, NoSuchTarget, ShorterLayer, StillRunning
from qmpmerge.images.headers import Oddity
from qmpmerge.operations.clean import Cleaned
from qmpmerge.operations.examine import Examination, Examined
from qmpmerge.operations.snapshot import Overlay
from qmpmerge.operations.tidy import Tidied, Tidying
from qmpmerge.processes.vms import Vm
from qmpmerge.qemu.blockgraph import Disk, Layout
from qmpmerge.qemu.jobs import Job
from qmpmerge.targets.target import ChainView

GIB = 1024**3
SEVERE: tuple[Severity, ...] = ("care", "care", "note", "note")
EVIL = "x\x1b]0;owned\x07\x1b[2J\ny\u202ez\udcff"
"""Sets the window's title, clears the screen, starts a line of its own, turns the text around, and is no UTF-8."""


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """An output, and what it has written."""

    def __init__(self, *, quiet: bool = False, terminal: bool = False) -> None:
        self.out, self.err = io.StringIO(), Terminal() if terminal else io.StringIO()
        self.clock = Clock()
        self.output = TextOutput(self.out, self.err, quiet=quiet, clock=self.clock)

    def says(self, *lines: str) -> bool:
        """Compare stdout, line by line, and see that stderr is silent."""
        assert self.out.getvalue().splitlines() == list(lines)
        assert self.err.getvalue() == ""
        return True

    def complains(self, *lines: str) -> bool:
        """Compare stderr, line by line, and see that stdout is silent."""
        assert self.err.getvalue().splitlines() == list(lines)
        assert self.out.getvalue() == ""
        return True


@pytest.fixture
def screen() -> Screen:
    return Screen()


BASE = Image("/vm/base.raw", "raw", 10 * GIB, node="#block3", allocated=4 * GIB)
A = Image("/vm/a.qcow2", "qcow2", 10 * GIB, node="#block2", backing="base.raw", backing_format="raw", allocated=GIB)
B = Image("/vm/b.qcow2", "qcow2", 10 * GIB, node="#block1", backing="a.qcow2", backing_format="qcow2", allocated=196624)
THREE, ONE = Chain((BASE, A, B)), Chain((BASE,))
JOB = Job("qmpmerge-commit-vda", "commit", "running", GIB, 4 * GIB, disk="vda")


def disk(name: str = "vda", chain: Chain | None = THREE, job: Job | None = None) -> Disk:
    return Disk(name, drive=name, qdev=None, root="#block1", chain=chain, nodes=("#block1", "#block2"), job=job)


def view(chain: Chain, *oddities: Oddity, name: str = "vda") -> ChainView:
    return ChainView(disk(name, chain), chain, oddities, Layout((), (), {}, {}))


# --- tables -------------------------------------------------------------------------------------------------------


def test_disks_are_a_table_with_an_image_a_line(screen: Screen) -> None:
    read_only = Chain((dataclasses.replace(BASE, file="/vm/cd.iso", allocated=None, read_only=True),))
    screen.output.disks([disk(job=JOB), disk("cd0", read_only), disk("floppy0", None)])
    assert screen.says(
        "DISK     FORMAT  DEPTH    SIZE  ALLOCATED  JOB                  ACTIVE IMAGE",
        "vda      qcow2       3  10 GiB    192 KiB  qmpmerge-commit-vda  /vm/b.qcow2",
        "cd0      raw         1  10 GiB          -                       /vm/cd.iso (read-only)",
        "floppy0                                                         (empty)",
    )


def test_a_column_that_nobody_fills_is_left_out(screen: Screen) -> None:
    screen.output.disks([disk()], [Oddity("unfinished", "/vm/b.qcow2", "a merge was not finished")])
    assert screen.says(
        "DISK  FORMAT  DEPTH    SIZE  ALLOCATED  ACTIVE IMAGE",
        "vda   qcow2       3  10 GiB    192 KiB  /vm/b.qcow2",
        "problem: /vm/b.qcow2: a merge was not finished (unfinished)",
    )


def test_a_chain_is_drawn_then_listed_base_first_then_its_oddities_follow(screen: Screen) -> None:
    screen.output.chain(view(THREE, Oddity("no-format", "/vm/b.qcow2", "its header records no backing format")))
    assert screen.says(
        "vda: base.raw <-- a.qcow2 <-- b.qcow2",
        "INDEX  FORMAT    SIZE  ALLOCATED  NODE     FILE (* active)  BACKING",
        "    1  raw     10 GiB      4 GiB  #block3  /vm/base.raw",
        "    2  qcow2   10 GiB      1 GiB  #block2  /vm/a.qcow2      base.raw",
        "    3  qcow2   10 GiB    192 KiB  #block1  /vm/b.qcow2 *    a.qcow2",
        "problem: /vm/b.qcow2: its header records no backing format (no-format)",
    )


def test_a_chain_of_one_is_listed_without_a_backing_column(screen: Screen) -> None:
    screen.output.chain(view(ONE))
    assert screen.says(
        "vda: base.raw",
        "INDEX  FORMAT    SIZE  ALLOCATED  NODE     FILE (* active)",
        "    1  raw     10 GiB      4 GiB  #block3  /vm/base.raw *",
    )


def test_images_of_one_name_in_two_folders_are_drawn_with_their_folders(screen: Screen) -> None:
    other = dataclasses.replace(A, file="/old/base.raw")
    screen.output.chain(view(Chain((BASE, other))))
    assert screen.out.getvalue().splitlines()[0] == "vda: /vm/base.raw <-- /old/base.raw"


def test_jobs_are_a_table_with_what_can_be_done_to_each(screen: Screen) -> None:
    full = Job("j1", "mirror", "paused", 0, 0, speed=100 * 1024**2, io_status="nospace")
    ended = Job("j2", "backup", "concluded", GIB, GIB, reason="No space left on device")
    screen.output.jobs([JOB, full, ended])
    assert screen.says(
        "JOB                  TYPE    DISK  STATUS             DONE                SPEED",
        "qmpmerge-commit-vda  commit  vda   running            1 GiB of 4 GiB  unlimited",
        "j1                   mirror  -     paused (no space)  0 B of 0 B      100 MiB/s",
        "j2                   backup  -     concluded          1 GiB of 1 GiB  unlimited",
        "qmpmerge-commit-vda: possible now: follow, pause, speed, cancel",
        "j1: possible now: resume, speed, cancel",
        "j2: No space left on device",
        "j2: possible now: dismiss",
    )


def test_running_vms_are_a_table_with_a_target_for_the_other_commands(screen: Screen) -> None:
    ours = Vm(42, "web", ("/run/web.sock", "tcp:127.0.0.1:4444"), False, "me", "qemu-system-x86_64", 0.0)
    theirs = Vm(7, None, (), True, "root", "qemu-kvm", 0.0)
    screen.output.vms([ours, theirs])
    assert screen.says(
        "NAME  PID  USER           MONITOR",
        "web    42  me             /run/web.sock, tcp:127.0.0.1:4444",
        "-       7  root  libvirt  no monitor",
    )


@pytest.mark.parametrize(
    ("show", "note"),
    [
        (lambda output: output.disks([]), "no disks"),
        (lambda output: output.jobs([]), "no block jobs"),
        (lambda output: output.vms([]), "no running QEMU found"),
    ],
)
def test_an_empty_list_leaves_stdout_empty_and_says_so_on_stderr(show: Callable[[TextOutput], None], note: str) -> None:
    loud, quiet = Screen(), Screen(quiet=True)
    show(loud.output)
    show(quiet.output)
    assert loud.complains(note) and quiet.complains()


# --- outcomes -----------------------------------------------------------------------------------------------------

GONE = (MergedFile("/vm/a.qcow2", now="/vm/a.qcow2"),)
MERGED = Outcome("merged", "vda", THREE, Chain((BASE, B)), None, GONE, seconds=1.5, hints=("delete them later",))
PIVOTED = Outcome(
    "pivoted",
    "vda",
    THREE,
    ONE,
    None,
    (*GONE, MergedFile("/vm/b.qcow2", now="/vm/b.qcow2")),
    copied=GIB,
    seconds=12.345,
    hints=("start the VM from /vm/base.raw",),
)


@pytest.mark.parametrize(
    ("outcome", "lines", "hints"),
    [
        (
            MERGED,
            [
                "vda: merged in 1.50 s",
                "  before  base.raw <-- a.qcow2 <-- b.qcow2",
                "  after   base.raw <-- b.qcow2",
                "  files   a.qcow2: left as before in /vm",
            ],
            ["hint: delete them later"],
        ),
        (
            PIVOTED,
            [
                "vda: pivoted in 12.35 s, 1 GiB copied",
                "  before  base.raw <-- a.qcow2 <-- b.qcow2",
                "  after   base.raw",
                "  files   a.qcow2, b.qcow2: left as before in /vm",
            ],
            ["hint: start the VM from /vm/base.raw"],
        ),
        (
            Outcome("pivoted", "vda", THREE, ONE, converge=("the guest was paused",)),
            [
                "vda: pivoted",
                "  before  base.raw <-- a.qcow2 <-- b.qcow2",
                "  after   base.raw",
                "  helped  the guest was paused",
            ],
            [],
        ),
        (
            Outcome("kept", "vda", THREE, THREE, copied=0, seconds=2, hints=("base held all data",)),
            [
                "vda: kept in 2.00 s, 0 B copied",
                "  chain   base.raw <-- a.qcow2 <-- b.qcow2",
            ],
            ["hint: base held all data"],
        ),
        (
            Outcome("ready", "vda", THREE, THREE, JOB, copied=GIB, seconds=2, hints=("one", "two")),
            [
                "vda: ready in 2.00 s, 1 GiB copied",
                "  chain   base.raw <-- a.qcow2 <-- b.qcow2",
            ],
            ["hint: one", "hint: two"],
        ),
        (
            Outcome("planned", "vda", THREE, Chain((BASE, B)), merged=GONE),
            [
                "vda: planned, nothing was changed",
                "  before  base.raw <-- a.qcow2 <-- b.qcow2",
                "  after   base.raw <-- b.qcow2",
                "  files   a.qcow2: to be left as before in /vm",
            ],
            [],
        ),
        (
            Outcome("unchanged", "vda", ONE, ONE),
            ["vda: nothing to merge, base.raw has no backing file"],
            [],
        ),
        (
            Outcome("unchanged", "vda", THREE, THREE),
            ["vda: nothing to merge, base.raw <-- a.qcow2 <-- b.qcow2"],
            [],
        ),
    ],
    ids=lambda value: value.verdict if isinstance(value, Outcome) else "",
)
def test_an_outcome_is_told_on_stdout_and_its_hints_on_stderr(
    outcome: Outcome, lines: list[str], hints: list[str]
) -> None:
    loud, quiet = Screen(), Screen(quiet=True)
    loud.output.commit(outcome)
    quiet.output.commit(outcome)
    assert loud.out.getvalue().splitlines() == quiet.out.getvalue().splitlines() == lines
    assert loud.err.getvalue().splitlines() == hints
    assert quiet.err.getvalue() == ""


def test_a_snapshot_is_told_with_a_line_a_disk(screen: Screen) -> None:
    made = [
        Overlay("vda", "/vm/c.qcow2", "n1", "/vm/b.qcow2", ask="/vm/base.raw"),
        Overlay("vdb", "/vm/d.qcow2", "n2", "/b.raw", "a hint"),
    ]
    screen.output.snapshot(made)
    assert screen.err.getvalue().splitlines() == [
        "hint: for launch scripts: `qmpmerge active /vm/base.raw`",
        "hint: a hint",
    ]
    assert screen.out.getvalue().splitlines() == [
        "vda: /vm/c.qcow2 is the active image now",
        "  start the VM from it from now on",
        "  /vm/b.qcow2 shows older data, and writing to it ruins the overlay",
        "vdb: /vm/d.qcow2 is the active image now",
        "  start the VM from it from now on",
        "  /b.raw shows older data, and writing to it ruins the overlay",
    ]


def test_a_controlled_job_is_told_with_its_status_and_speed_or_that_it_is_gone(screen: Screen) -> None:
    screen.output.controlled(JOB.id, "pause", dataclasses.replace(JOB, status="paused"))
    screen.output.controlled(JOB.id, "speed", dataclasses.replace(JOB, speed=50 * 1024**2))
    screen.output.controlled(JOB.id, "dismiss", None)
    assert screen.says(
        "qmpmerge-commit-vda: paused, no speed limit",
        "qmpmerge-commit-vda: running, at most 50 MiB/s",
        "qmpmerge-commit-vda: dismissed",
    )


def test_where_nothing_was_looked_at_nothing_is_said_to_be_right(screen: Screen) -> None:
    missed = Examined("vm1", (), NoSuchDisk(disk="vda", target="vm1", known=[]))
    screen.output.doctor(Examination((missed,), vms=0, images=0))
    assert screen.says("looked at 0 VMs, 0 images, not at vm1")


def test_several_notes_are_notes(screen: Screen) -> None:
    found = [Finding(name, severity, "vda", "it is", "look") for name, severity in zip("abcd", SEVERE, strict=True)]
    screen.output.doctor(Examination((Examined("vm1", tuple(found)),), vms=1, images=3))
    assert screen.out.getvalue().endswith("looked at 1 VM, 3 images: 2 care, 2 notes\n")


@pytest.mark.parametrize(
    ("severities", "said"),
    [((), []), (("note",), []), (("note", "care"), ["care: vda (b)", "  what  it is", "  why   look"])],
)
def test_who_wants_quiet_is_told_only_what_there_is_to_do(severities: tuple[Severity, ...], said: list[str]) -> None:
    out = io.StringIO()
    found = tuple(Finding("ab"[place], one, "vda", "it is", "look") for place, one in enumerate(severities))
    TextOutput(out, out, quiet=True).doctor(Examination((Examined("vm1", found),), vms=1, images=3))
    told = out.getvalue().splitlines()
    assert told == ([*said, "looked at 1 VM, 3 images: 1 care, 1 note"] if said else [])


def test_a_finding_has_a_fix_where_there_is_one(screen: Screen) -> None:
    harm = Finding("a", "harm", "vda", "it hurts", "it will", "mend it")
    note = Finding("b", "note", "vdb", "it is", "look yourself")
    screen.output.doctor(Examination((Examined("vm1", (note, harm)),), vms=1, images=3))
    assert screen.says(
        "harm: vda (a)",
        "  what  it hurts",
        "  why   it will",
        "  fix   mend it",
        "note: vdb (b)",
        "  what  it is",
        "  why   look yourself",
        "looked at 1 VM, 3 images: 1 harm, 1 note",
    )


def test_what_was_not_looked_at_and_what_was_forced_is_told_of_every_merge_and_what_passed_of_a_plan(
    screen: Screen,
) -> None:
    checks = (
        Checked("busy", "passed"),
        Checked("dependents", "passed", scope="2 files in 1 folder: /vm"),
        Checked("in-use", "not checked", "it is hidden"),
        Checked("no-space", "forced"),
    )
    screen.output.commit(dataclasses.replace(PIVOTED, merged=(), hints=(), checks=checks))
    screen.output.commit(Outcome("planned", "vda", THREE, ONE, checks=checks))
    unpassed = [
        "  not checked  that nobody else uses the images (in-use): it is hidden",
        "  forced  no-space: it is not sure that there is room for what is copied",
    ]
    assert screen.says(
        "vda: pivoted in 12.35 s, 1 GiB copied",
        "  before  base.raw <-- a.qcow2 <-- b.qcow2",
        "  after   base.raw",
        *unpassed,
        "vda: planned, nothing was changed",
        "  before  base.raw <-- a.qcow2 <-- b.qcow2",
        "  after   base.raw",
        "  checks  2 of 4 passed",
        "          no other image is built on what changes (looked at 2 files in 1 folder: /vm)",
        "  then    start the VM from /vm/base.raw",
        *unpassed,
    )


def test_every_check_has_words() -> None:
    assert set(outcome.MEANINGS) == set(CHECKS)


# --- failures -----------------------------------------------------------------------------------------------------


def test_a_failure_is_a_sentence_and_a_hint_on_stderr(screen: Screen) -> None:
    screen.output.failure(ShorterLayer(image="/vm/a.qcow2", size=GIB, base="/vm/base.raw", base_size=2 * GIB))
    assert screen.complains(
        "refused: /vm/a.qcow2 is shorter than /vm/base.raw (1073741824 < 2147483648 bytes): "
        "the merge would uncover the base's stale data",
        "hint: merge into an image above the short one, or grow it first with `block_resize` or `qemu-img resize`",
    )


def test_a_list_of_facts_is_told_as_words(screen: Screen) -> None:
    screen.output.failure(JobVerb(job="j", verb="pivot", status="running", verbs=["follow", "cancel"]))
    screen.output.failure(NoSuchDisk(disk="vdx", target="vm1", known=[]))
    assert screen.complains(
        "refused: job j is running and cannot pivot now",
        "hint: possible now: follow, cancel",
        "refused: no disk vdx on vm1",
        "hint: disks there: none",
    )


def test_the_verdict_stands_first_so_that_a_log_can_be_searched_for_it(screen: Screen) -> None:
    screen.output.failure(StillRunning(target="vm1", job="j"))
    screen.output.failure(Cancelled())
    assert [line.split(": ")[0] for line in screen.err.getvalue().splitlines()[::2]] == ["running", "cancelled"]


def test_quiet_keeps_what_to_do_about_a_failure() -> None:
    screen = Screen(quiet=True)
    screen.output.failure(Cancelled())
    assert screen.complains(f"cancelled: {Cancelled()}", f"hint: {Cancelled().hint}")


def test_notes_are_for_people_and_go_with_quiet() -> None:
    loud, quiet = Screen(), Screen(quiet=True)
    loud.output.note("cancelling")
    quiet.output.note("cancelling")
    assert loud.complains("cancelling") and quiet.complains()


SENT = {"t": 0.5, "kind": "sent", "session": 1, "message": {}}


def test_the_conversation_is_shown_on_stderr_even_when_quiet() -> None:
    screen = Screen(quiet=True)
    screen.output.trace({**SENT, "message": {"execute": "query-jobs", "id": "7"}})
    assert screen.complains('0.500000 -> {"execute": "query-jobs"}')


# --- progress -----------------------------------------------------------------------------------------------------


def told(percent: int, name: str = "vda") -> Progress:
    return Progress(name, dataclasses.replace(JOB, done=-(-percent * GIB // 100), total=GIB), "copied")


def test_progress_is_a_plain_line_every_ten_per_cent_where_no_terminal_is(screen: Screen) -> None:
    screen.output.progress(told(0))
    screen.clock.now += 1
    for percent in (4, 9, 11, 12, 19, 20, 47, 49, 100, 100):
        screen.output.progress(told(percent))
    screen.output.close()
    assert [line.split(",")[0] for line in screen.err.getvalue().splitlines()] == [
        "vda: 11 %",
        "vda: 20 %",
        "vda: 47 %",
        "vda: 100 %",
    ]
    assert screen.out.getvalue() == "" and "\r" not in screen.err.getvalue() and "\x1b" not in screen.err.getvalue()


def test_a_progress_line_says_what_was_copied(screen: Screen) -> None:
    screen.output.progress(told(0))
    screen.clock.now += 1
    screen.output.progress(dataclasses.replace(told(50), rate=128 * 1024**2, seconds_left=4.0))
    assert screen.complains("vda: 50 %, copied 512 MiB of 1 GiB, 128 MiB/s, 4 s left")


def test_a_guest_that_outruns_the_copy_is_told_at_once_and_what_helps(screen: Screen) -> None:
    outrun = dataclasses.replace(told(50), rate=8 * 1024**2, dirty_rate=9 * 1024**2, converging=False)
    screen.output.progress(dataclasses.replace(outrun, hint="less work"))
    screen.clock.now += 1
    screen.output.progress(outrun)
    assert screen.complains(
        "hint: vda: less work",
        "vda: 50 %, copied 512 MiB of 1 GiB, 8 MiB/s, the guest writes 9 MiB/s, never ready like this",
    )


def test_what_is_over_within_half_a_second_shows_no_progress(screen: Screen) -> None:
    for percent in (0, 50, 100):
        screen.output.progress(told(percent))
        screen.clock.now += 0.24
    assert screen.complains()


def test_progress_is_shown_from_half_a_second_on(screen: Screen) -> None:
    screen.output.progress(told(0))
    screen.clock.now += 0.5
    screen.output.progress(told(30))
    assert screen.complains("vda: 30 %, copied 307 MiB of 1 GiB")


def test_progress_without_a_total_is_silent_where_no_terminal_is(screen: Screen) -> None:
    screen.output.progress(dataclasses.replace(told(0), job=dataclasses.replace(JOB, done=0, total=0)))
    screen.clock.now += 1
    screen.output.progress(dataclasses.replace(told(0), job=dataclasses.replace(JOB, done=0, total=0)))
    assert screen.complains()


def test_quiet_shows_no_progress() -> None:
    for terminal in (False, True):
        screen = Screen(quiet=True, terminal=terminal)
        screen.output.progress(told(0))
        screen.clock.now += 1
        screen.output.progress(told(50))
        screen.output.close()
        assert screen.complains()


# --- on a terminal ------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A terminal that can move its cursor, whatever the tests themselves run on."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen(terminal=True)
    screen.output.progress(told(0))
    screen.clock.now += 1
    return screen


ERASED = "\r\x1b[K"


def test_a_terminal_gets_a_bar_that_is_taken_away_at_the_end(terminal: Screen) -> None:
    terminal.output.progress(told(30))
    terminal.output.progress(told(60))
    terminal.output.close()
    terminal.output.close()
    assert terminal.err.getvalue() == (
        "\r━━━━━━━───────────────── vda: 30 %, copied 307 MiB of 1 GiB\x1b[K"
        "\r━━━━━━━━━━━━━━────────── vda: 60 %, copied 614 MiB of 1 GiB\x1b[K"
        f"{ERASED}"
    )
    assert terminal.out.getvalue() == ""


@pytest.mark.parametrize("columns", [20, 40, 60, 79, 80, 81, 200])
def test_a_bar_is_never_wider_than_the_terminal_or_it_could_not_be_drawn_over(
    columns: int, terminal: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    slow = dataclasses.replace(told(30), rate=250 * 1024**2, seconds_left=12345, dirty_rate=GIB, converging=False)
    for disk_name in ("vda", "虚拟" * 8):
        terminal.output.progress(dataclasses.replace(slow, disk=disk_name))
    lines = terminal.err.getvalue().replace("\x1b[K", "").split("\r")[1:]
    assert len(lines) == 2 and all(0 < width(line) < columns for line in lines)
    assert all(("━" in line) == (columns > 150) for line in lines)


def test_disks_of_several_targets_share_the_line_until_each_is_done(terminal: Screen) -> None:
    for target, done in (("vm1", 30), ("vm2", 10)):
        terminal.output.progress(dataclasses.replace(told(done), target=target))
    assert (
        terminal.err.getvalue()
        .rpartition("\r")[2]
        .startswith("━" * 5 + "─" * 19 + " 2 disks: vm1 vda 30 %, vm2 vda 10 %")
    )
    terminal.output.tidied(Tidied("vm1", "vda", Outcome("merged", "vda", THREE, ONE)))
    terminal.output.progress(dataclasses.replace(told(20), target="vm2"))
    assert " vm2 vda: 20 %, copied " in terminal.err.getvalue().rpartition("\r")[2]
    assert terminal.out.getvalue().startswith("vm1 vda: ")


def test_what_is_the_same_of_many_disks_is_told_once(screen: Screen) -> None:
    cancelled = [Tidied(f"vm{number}", disk, error=Cancelled()) for number in (1, 2) for disk in ("vda", "vdb")]
    done = [*cancelled, Tidied("vm3", None, error=Cancelled()), Tidied("vm4", None, error=NoSuchTarget(target="vm4"))]
    screen.output.tidied(*done)
    screen.output.tidy(Tidying(tuple(done)))
    assert screen.out.getvalue() == "4 disks: 4 cancelled; not looked at: vm4\n"
    assert screen.err.getvalue().splitlines() == [
        "unreachable: vm4: no socket and no running QEMU called vm4",
        "hint: `qmpmerge vms` lists the running QEMUs and their monitors",
        "cancelled: vm1 vda, vm1 vdb and 3 more: the disks show what they did",
        "hint: run the same command again when you like",
    ]


def test_a_note_on_one_of_several_targets_names_it(screen: Screen) -> None:
    screen.output.progress(dataclasses.replace(told(10), target="vm1", note="job qmpmerge-commit-vda is at work"))
    assert screen.complains("vm1 vda: job qmpmerge-commit-vda is at work")


def test_a_dumb_terminal_gets_lines(terminal: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen(terminal=True)
    screen.output.progress(told(0))
    screen.clock.now += 1
    screen.output.progress(told(30))
    assert screen.complains("vda: 30 %, copied 307 MiB of 1 GiB")


def test_a_terminal_sees_no_bar_for_what_is_over_within_half_a_second(terminal: Screen) -> None:
    terminal.clock.now -= 0.9
    terminal.output.progress(told(100))
    terminal.output.close()
    assert terminal.complains()


@pytest.mark.parametrize(
    "show",
    [
        lambda output: output.commit(MERGED),
        lambda output: output.failure(Cancelled()),
        lambda output: output.note("a note"),
        lambda output: output.disks([disk()]),
        lambda output: output.trace(SENT),
    ],
    ids=["outcome", "failure", "note", "table", "trace"],
)
def test_the_bar_ends_before_anything_else_is_said(terminal: Screen, show: Callable[[TextOutput], None]) -> None:
    terminal.output.progress(told(30))
    show(terminal.output)
    drawn, after = terminal.err.getvalue().split(ERASED)
    assert "vda: 30 %" in drawn and "\x1b" not in after and "\r" not in after


def test_the_bar_comes_back_after_a_note(terminal: Screen) -> None:
    terminal.output.progress(told(30))
    terminal.output.note("a note")
    terminal.output.progress(told(60))
    assert "vda: 60 %" in terminal.err.getvalue().partition(f"{ERASED}a note\n")[2]


def test_a_name_never_reaches_the_terminal_raw_with_a_bar(terminal: Screen) -> None:
    terminal.output.progress(told(30, EVIL))
    terminal.output.close()
    drawn = terminal.err.getvalue()
    assert r"x\x1b]0;owned\x07\x1b[2J\x0ay\u202ez\xff: 30 %" in drawn
    assert not [mark for mark in ("\x1b]", "\x1b[2J", "\x07", "\u202e", "\udcff") if mark in drawn]


# --- names from outside -------------------------------------------------------------------------------------------


def everything(output: TextOutput, name: str) -> None:
    """Say all that can be said, with `name` wherever the outside world has a say."""
    path = f"/vm/{name}"
    image = Image(path, name, GIB, node=name, backing=name, backing_format=name)
    job = Job(name, name, name, 0, GIB, reason=name, io_status=name, disk=name)
    named = Chain((image, dataclasses.replace(image, file=f"{path}2")))
    output.vms([Vm(1, name, (name,), True, name, name, 0.0)])
    output.disks([disk(name, named, job)])
    output.chain(view(named, Oddity("no-format", path, name), name=name))
    output.snapshot([Overlay(name, path, name, path)])
    for verdict in ("merged", "planned", "unchanged"):
        output.commit(Outcome(verdict, name, named, named, job, (MergedFile(path, now=path),), hints=(name,)))
    output.jobs([job])
    output.controlled(name, "resume", dataclasses.replace(job, status="running"))
    output.failure(NoSuchDisk(disk=name, target=name, known=[name]))
    output.note(name)
    output.trace({**SENT, "kind": "received", "message": {"return": name}})


@given(st.one_of(st.just(EVIL), st.text(st.characters(exclude_categories=()), min_size=1, max_size=8)))
def test_no_name_reaches_a_stream_raw(name: str) -> None:
    screen = Screen()
    everything(screen.output, name)
    screen.output.progress(told(0, name))
    screen.clock.now += 1
    screen.output.progress(told(50, name))
    for stream in (screen.out, screen.err):
        lines = stream.getvalue().split("\n")
        assert lines.pop() == "" and all(line.isprintable() for line in lines)


def test_a_name_with_a_line_break_does_not_make_lines_of_its_own() -> None:
    tame, wild = Screen(), Screen()
    everything(tame.output, "vda")
    everything(wild.output, "v\nd\r\n\u2028a")
    for one, other in ((tame.out, wild.out), (tame.err, wild.err)):
        assert len(one.getvalue().splitlines()) == len(other.getvalue().splitlines())


# --- after a crash ------------------------------------------------------------------------------------------------------

STASHED = MergedFile("/vm/a.qcow2", "stash", "/vm/a.qcow2.merged")


def test_a_pivot_tells_the_pause_and_what_became_of_the_files() -> None:
    screen = Screen()
    merged = (
        STASHED,
        MergedFile("/vm/b.qcow2", "stash", "/vm/b.qcow2.merged.2"),
        MergedFile("/vm/c.qcow2", "delete"),
        MergedFile("/vm/d.qcow2", "gone"),
        MergedFile("nbd://host/e", "keep", "nbd://host/e"),
    )
    screen.output.commit(Outcome("pivoted", "vda", THREE, ONE, None, merged, seconds=1, paused_seconds=0.0074))
    assert screen.says(
        "vda: pivoted in 1.00 s, guest paused for 7 ms",
        "  before  base.raw <-- a.qcow2 <-- b.qcow2",
        "  after   base.raw",
        "  files   a.qcow2, b.qcow2 (now b.qcow2.merged.2): renamed to NAME.merged in /vm",
        "  files   c.qcow2: deleted in /vm",
        "  files   d.qcow2: gone already in /vm",
        "  files   nbd://host/e: left as before",
    )


def test_a_recovery() -> None:
    screen = Screen()
    screen.output.recovered([Recovery("done", "/vm/a.qcow2", "/vm/base.raw", "it had happened", (EVIL,), (STASHED,))])
    assert screen.says(
        "/vm/a.qcow2: done, it had happened",
        f"  because  {visible(EVIL)}",
        "  start the VM from /vm/base.raw",
        "  files   a.qcow2: renamed to NAME.merged in /vm",
    )


def test_what_was_cleaned() -> None:
    screen = Screen()
    found = [Cleaned("/vm/a.merged", 4096, None), Cleaned("/vm/b.merged", 0, "in use")]
    screen.output.cleaned(found, dry_run=False)
    screen.output.cleaned(found[:1], dry_run=True)
    screen.output.cleaned([], dry_run=True)
    assert screen.says(
        "/vm/a.merged: removed, 4 KiB",
        "/vm/b.merged: stays: in use",
        "1 of 2 files removed, 4 KiB",
        "/vm/a.merged: would be removed, 4 KiB",
        "nothing is stashed here",
    )
