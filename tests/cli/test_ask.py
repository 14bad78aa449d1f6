"""The question before a guest is moved onto its base, on a real terminal."""

import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from rig import terminal
from rig.command import JOB, invoke
from rig.disks import Setup
from rig.folder import beside, litter
from rig.machines import Content, create_encrypted, run
from rig.terminal import CTRL_C, CTRL_D, ENTER, on_terminal

from qmpmerge.cli.ask import CHOICE
from qmpmerge.engine.pace import patience
from qmpmerge.testing.stored import Stored

BEFORE, AFTER = "base.raw <-- a.qcow2 <-- b.qcow2 <-- c.qcow2", "  after   base.raw\n"
UNCHANGED = "cancelled: the disks show what they did"


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in beside(folder) if (folder / name).is_file()}


# --- the answer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [ENTER, "n" + ENTER, " No" + ENTER, "y" + CTRL_D * 2, CTRL_C, CTRL_D], ids=repr)
def test_no_leaves_the_images_as_they_were(answer: str, images: list[Path], content: Content) -> None:
    folder = images[0].parent
    before = contents(folder)
    with on_terminal("commit", str(images[-1])) as seen:
        seen.wait_for(CHOICE)
        assert BEFORE in seen.screen and AFTER in seen.screen
        assert "\nMerge, and have the VM use base.raw from now on? " in seen.screen
        seen.type(answer)
        ended = seen.end()
    assert ended.code == 130 and UNCHANGED in terminal.plain(ended.out).rpartition(CHOICE)[2]
    assert contents(folder) == before


@pytest.mark.parametrize("answer", ["y", "Yes "])
def test_a_yes_merges_as_shown(answer: str, setup: Setup) -> None:
    with on_terminal("commit", setup.machine.target) as seen:
        seen.wait_for(CHOICE)
        seen.type(answer + ENTER)
        ended = seen.end()
    assert (ended.code, ended.out.count(CHOICE), ended.out.count(AFTER)) == (0, 1, 2)
    setup.check()


def test_what_is_neither_yes_nor_no_is_asked_again(setup: Setup) -> None:
    with on_terminal("commit", setup.machine.target) as seen:
        for word in ("yay", "foo y"):
            seen.wait_for(CHOICE)
            seen.type(word + ENTER)
            seen.wait_for("Please answer y or n ")
        seen.wait_for(CHOICE)
        seen.type("y" + ENTER)
        assert seen.end().code == 0
    setup.check()


def test_what_was_typed_before_the_question_is_no_answer(setup: Setup) -> None:
    with on_terminal("commit", setup.machine.target) as seen:
        seen.type("y" + ENTER)
        seen.wait_for(CHOICE)
        seen.type(ENTER)
        assert seen.end().code == 130


def test_quiet_is_no_yes(setup: Setup) -> None:
    with on_terminal("commit", setup.machine.target, "-q") as seen:
        seen.wait_for(CHOICE)
        seen.type(ENTER)
        assert seen.end().code == 130


# --- while it stands --------------------------------------------------------------------------------------------------


def test_nothing_is_held_while_the_question_stands(setup: Setup, tmp_path: Path) -> None:
    with on_terminal("commit", setup.machine.target) as seen:
        seen.wait_for(CHOICE)
        assert invoke("disks", setup.machine.target).code == 0  # its monitor takes one client at a time
        assert litter(tmp_path) == []
        seen.type("y" + ENTER)
        assert seen.end().code == 0


def test_images_that_the_question_is_about_can_be_used_meanwhile(images: list[Path], content: Content) -> None:
    with on_terminal("commit", str(images[-1])) as seen:
        seen.wait_for(CHOICE)
        run("qemu-io", "-f", "qcow2", "-c", content.put(0x77, 0, 4096), images[-1])
        seen.type("y" + ENTER)
        assert seen.end().code == 0
    content.check(images[0])


def test_a_chain_that_has_changed_meanwhile_is_shown_and_asked_about(setup: Setup, tmp_path: Path) -> None:
    with on_terminal("commit", setup.machine.target) as seen:
        seen.wait_for(CHOICE)
        assert invoke("snapshot", setup.machine.target, f"vda={tmp_path}/d.qcow2").code == 0
        seen.type("y" + ENTER)
        seen.wait_for("the images have changed since")
        seen.wait_for(f"{BEFORE} <-- d.qcow2\n{AFTER}")
        seen.wait_for(CHOICE)
        seen.type(ENTER)
        assert seen.end().code == 130
    setup.check()


def test_a_merge_that_was_begun_meanwhile_is_gone_on_with(setup: Setup) -> None:
    with on_terminal("commit", setup.machine.target, "--speed", "0") as seen:
        seen.wait_for(CHOICE)
        assert invoke("commit", setup.machine.target, "--speed", "1", "--detach").code == 7
        seen.type("y" + ENTER)
        assert seen.end().code == 0
    setup.check()


# --- where there is none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [["--yes"], ["-y"], ["--json"], ["--keep-overlay"], ["--wait-ready"], ["--top", "[3]"], ["--dry-run"]],
    ids=" ".join,
)
def test_who_has_said_so_or_moves_no_guest_is_not_asked(options: list[str], setup: Setup) -> None:
    with on_terminal("commit", setup.machine.target, *options) as seen:
        ended = seen.end()
    assert ended.code == 0 and CHOICE not in ended.out


@pytest.mark.parametrize("elsewhere", ["< {0}/no", "2> {0}/err", "< {0}/yes > {0}/out", "< {0}/yes 2> {0}/err"])
def test_one_stream_on_the_terminal_is_enough_to_be_asked_there(elsewhere: str, setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "no").write_text("n\n" * 9)
    (tmp_path / "yes").write_text("y\n" * 9)
    with on_terminal("commit", setup.machine.target, elsewhere=elsewhere.format(tmp_path)) as seen:
        seen.wait_for(AFTER)
        seen.wait_for(CHOICE)
        seen.type("n" + ENTER)
        assert seen.end().code == 130
    assert "c.qcow2" in invoke("chain", setup.machine.target).out


def test_who_has_no_stream_on_the_terminal_is_not_asked(setup: Setup, tmp_path: Path) -> None:
    with on_terminal("commit", setup.machine.target, elsewhere=f"< /dev/null > {tmp_path}/out 2>&1") as seen:
        ended = seen.end()
    assert (ended.code, ended.out) == (0, "")
    assert "pivoted" in (tmp_path / "out").read_text()


def test_a_terminal_that_is_not_ours_is_asked_only_if_it_can_answer(setup: Setup) -> None:
    """A service's output may go to the console, where nobody sits."""
    with on_terminal("commit", setup.machine.target, elsewhere="< /dev/null", is_ours=False) as seen:
        assert "pivoted" in seen.end().out


def test_a_result_that_goes_elsewhere_is_asked_about_all_the_same(setup: Setup, tmp_path: Path) -> None:
    with on_terminal("commit", setup.machine.target, elsewhere=f"> {tmp_path}/result") as seen:
        seen.wait_for(CHOICE)
        seen.type("y" + ENTER)
        assert seen.end().code == 0
    said = (tmp_path / "result").read_text()
    assert said.startswith("vda: pivoted") and "planned" not in said


def test_a_merge_that_is_at_work_is_gone_on_with_unasked(setup: Setup) -> None:
    assert invoke("commit", setup.machine.target, "--speed", "1", "--detach").code == 7
    with on_terminal("commit", setup.machine.target, "--speed", "0") as seen:
        ended = seen.end()
    assert ended.code == 0 and CHOICE not in ended.out
    setup.check()


def test_the_end_of_a_job_is_not_asked_about(setup: Setup) -> None:
    assert invoke("commit", setup.machine.target, "--wait-ready").code == 0
    with on_terminal("job", setup.machine.target, JOB, "pivot") as seen:
        ended = seen.end()
    assert ended.code == 0 and CHOICE not in ended.out


def test_what_is_refused_is_not_asked_about(setup: Setup) -> None:
    with on_terminal("commit", setup.machine.target, "--base", "/nowhere") as seen:
        ended = seen.end()
    assert ended.code == 3 and CHOICE not in ended.out and ended.out.count("/nowhere") == 1


def test_a_disk_of_one_image_has_nothing_to_ask(setup: Setup) -> None:
    assert invoke("commit", setup.machine.target).code == 0
    with on_terminal("commit", setup.machine.target) as seen:
        ended = seen.end()
    assert ended.code == 0 and CHOICE not in ended.out


# --- secrets and time ---------------------------------------------------------------------------------------------------


@functools.cache
def _encrypted() -> Stored:
    key = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,encrypt.hash-alg=sha512"
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image"
        create_encrypted("--object", "secret,id=s,data=open", "-f", "qcow2", "-o", key, image, "1M")
        return Stored.of(image)


def make_encrypted(folder: Path) -> None:
    """An encrypted base and an overlay; QEMU takes two seconds of the processor's for such an image."""
    _encrypted().put(folder / "base.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", folder / "top.qcow2", "1M")


def test_a_passphrase_is_asked_for_once(tmp_path: Path) -> None:
    make_encrypted(tmp_path)
    with on_terminal("commit", str(tmp_path / "top.qcow2")) as seen:
        seen.wait_for("passphrase of ")
        seen.type("open" + ENTER)
        seen.wait_for(CHOICE)
        seen.type("y" + ENTER)
        ended = seen.end()
    assert ended.code == 0 and ended.out.count("passphrase of ") == 1


def test_a_passphrase_that_is_piped_in_is_read_once(tmp_path: Path) -> None:
    make_encrypted(tmp_path)
    words = ["commit", str(tmp_path / "top.qcow2"), "--secret", "/dev/stdin"]
    with on_terminal(*words, elsewhere="<< END\nopen\nEND\n") as seen:
        seen.wait_for(CHOICE)
        seen.type("y" + ENTER)
        assert seen.end().code == 0


def test_the_time_limit_counts_from_the_answer_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: now))
    limit = patience.Patience(10)
    now = 3700.0
    assert limit.left == -3590
    limit.begin_again()
    assert limit.left == 10
