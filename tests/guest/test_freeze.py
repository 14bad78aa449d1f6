"""
Freezing and thawing, against an agent of ours that speaks the protocol and can misbehave.

The dead man's switch is always the real process; in the tests of our own death the tool is one too. The tests at the end
meet the real agent, in a real guest.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from rig.agents import FREEZE, SILENCE, STATUS, THAW, Answer, FakeAgent, refusal, serving
from rig.guests import Guest, guest

from qmpmerge.errors import AgentFailed, FreezeUnproven, ThawUnproven
from qmpmerge.guest import agent, freeze
from qmpmerge.guest.deadman import Switch
from qmpmerge.guest.deadman_child import TRIES, Duty

SHORT = 1.0
"""The `timeout` where one has to pass: long enough for the exchanges before it on a busy host."""

PATIENCE = 60.0
"""What anything may take with a real guest: a busy host is slow, not broken."""

HANGS = [4 * SHORT, 75.0] if os.environ.get("QMPMERGE_ALL_KILLS") else [4 * SHORT]
"""For how long, in seconds, the agent hangs: the first one for longer than a few tries of `SHORT`."""


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeAgent]:
    async with serving(str(tmp_path / "agent.sock")) as fake:
        yield fake


def switches(pid: int | None = None) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if "deadman_child.py" in " ".join(child.cmdline())]


# --- it goes well -------------------------------------------------------------------------------------------------


async def test_the_guest_is_frozen_in_the_block_and_thawed_after_it(fake: FakeAgent) -> None:
    async with freeze.frozen(fake.path) as count:
        assert (count, fake.frozen) == (2, 2)
        assert len(switches()) == 1
    assert fake.frozen == 0
    assert switches() == []


async def test_a_second_freeze_can_follow_at_once(fake: FakeAgent) -> None:
    for _ in range(2):
        async with freeze.frozen(fake.path):
            pass
    assert fake.seen[FREEZE] == 2


async def test_a_guest_with_nothing_to_freeze_is_no_error(fake: FakeAgent) -> None:
    fake.filesystems = 0
    async with freeze.frozen(fake.path) as count:
        assert count == 0


@pytest.mark.parametrize(
    "stale",
    [
        b'{"return": 7}\n',
        b'\xff{"return": 12345}\n{"return": {}}\n',
        b'{"return": {"buf-b64": "AAAA',
        b'\xff\xff{"ret\xff',
        b"[" * 100_000,
        b'{"return": "' + b"x" * 1_000_000,
    ],
)
async def test_what_an_earlier_client_left_in_the_channel_is_skipped(fake: FakeAgent, stale: bytes) -> None:
    fake.stale = stale
    async with freeze.frozen(fake.path) as count:
        assert count == 2


async def test_half_a_command_of_an_earlier_client_is_cleared(fake: FakeAgent) -> None:
    fake.unfinished = b'{"execute": "guest-exec", "arguments": {"path": "'
    async with freeze.frozen(fake.path) as count:
        assert count == 2


async def test_a_socket_with_a_long_path(tmp_path: Path) -> None:
    folder = tmp_path / ("f" * 120)
    folder.mkdir()
    there = FakeAgent(str(folder / ("s" * 120)))
    before = Path.cwd()
    os.chdir(folder)  # bind(2) takes 107 bytes only, so it is bound by a short name and renamed
    try:
        server = await asyncio.start_unix_server(there.serve, "s")
    finally:
        os.chdir(before)
    (folder / "s").rename(there.path)
    async with freeze.frozen(there.path) as count:
        assert count == 2
    await there.is_alone()
    server.close()
    await server.wait_closed()


# --- it cannot be frozen: AgentFailed, and the guest is as it was ---------------------------------------------------


async def refused(path: str, timeout: float = 10.0) -> str:
    with pytest.raises(AgentFailed) as raised:
        async with freeze.frozen(path, timeout=timeout):
            pytest.fail("the block ran")
    assert raised.value.agent == path
    assert switches() == []
    return raised.value.reason


async def test_no_socket(tmp_path: Path) -> None:
    assert await refused(str(tmp_path / "none")) == "there is no such socket"


async def test_no_socket_with_a_long_path(tmp_path: Path) -> None:
    assert await refused(str(tmp_path / ("n" * 200))) == "there is no such socket"


async def test_a_path_that_the_system_does_not_take(tmp_path: Path) -> None:
    assert await refused(str(tmp_path / ("n" * 300))) == "File name too long"


async def test_nobody_listens(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "nobody listens" in await refused(str(tmp_path / "file"))


async def test_no_agent_in_the_guest(fake: FakeAgent) -> None:
    fake.always_answers("guest-sync-delimited", SILENCE)
    assert await refused(fake.path, timeout=0.1) == "no answer within 0.1 s"
    assert fake.seen[FREEZE] == 0


async def test_noise_without_an_end_is_given_up(fake: FakeAgent) -> None:
    fake.always_answers("guest-sync-delimited", b"x" * 10_000_000)
    assert await refused(fake.path, timeout=0.1) == "no answer within 0.1 s"


async def test_the_other_end_hangs_up(fake: FakeAgent) -> None:
    async def die() -> Answer:
        fake.die()
        return SILENCE

    fake.says[STATUS] = die
    assert "closed" in await refused(fake.path)


async def test_another_s_freeze_is_left_alone(fake: FakeAgent) -> None:
    fake.frozen = 1
    assert await refused(fake.path) == "somebody else has frozen it already"
    assert fake.frozen == 1
    assert fake.seen[THAW] == 0


async def test_the_agent_refuses(fake: FakeAgent) -> None:
    fake.answers(FREEZE, refusal("failed to freeze /: Input/output error"))
    assert await refused(fake.path) == "failed to freeze /: Input/output error"


async def test_every_command_is_disabled_in_the_guest(fake: FakeAgent) -> None:
    fake.always_answers(FREEZE, refusal("disabled"))
    fake.always_answers(THAW, refusal("disabled"))
    assert await refused(fake.path) == "disabled"


async def test_what_the_guest_says_cannot_write_on_the_terminal(fake: FakeAgent) -> None:
    fake.always_answers(STATUS, refusal("\x1b[2Jhello\n" + "x" * 1000))
    reason = await refused(fake.path)
    assert reason.startswith("?[2Jhello?xxx")
    assert len(reason) == 200


@pytest.mark.parametrize(
    "nonsense", [b"[]\n", b"\n", b"[" * 60_000 + b"\n", b'{"return": "many"}\n', b'{"error": 1}\n']
)
async def test_answers_that_make_no_sense(fake: FakeAgent, nonsense: bytes) -> None:
    fake.answers(FREEZE, nonsense)
    assert await refused(fake.path) == "its answer makes no sense"


async def test_a_freeze_that_takes_effect_too_late_is_thawed(fake: FakeAgent) -> None:
    async def late() -> Answer:
        fake.more.clear()
        await fake.more.wait()  # until the client has given up and sent the next command
        return fake.obey(FREEZE)

    fake.says[FREEZE] = late
    assert await refused(fake.path, timeout=SHORT) == "no answer within 1 s"
    assert fake.seen[FREEZE] == 1
    assert fake.frozen == 0


async def test_no_freeze_without_a_switch(fake: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert await refused(fake.path) == "the dead man's switch did not start: it does not answer"
    assert fake.seen[FREEZE] == 0


async def test_no_freeze_without_a_python(fake: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert await refused(fake.path) == "the dead man's switch did not start: No such file or directory"
    assert fake.seen[FREEZE] == 0


# --- every way out thaws --------------------------------------------------------------------------------------------


async def test_an_error_in_the_block(fake: FakeAgent) -> None:
    with pytest.raises(KeyError):
        async with freeze.frozen(fake.path):
            raise KeyError
    assert fake.frozen == 0


async def frozen_for_ever(fake: FakeAgent) -> None:
    async with freeze.frozen(fake.path):
        await asyncio.Event().wait()


async def test_cancellation_in_the_block(fake: FakeAgent) -> None:
    task = asyncio.create_task(frozen_for_ever(fake))
    await fake.has_seen(FREEZE)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert fake.frozen == 0


async def test_cancellation_during_the_freeze(fake: FakeAgent) -> None:
    begun = asyncio.Event()

    async def late() -> Answer:
        fake.more.clear()
        begun.set()
        await fake.more.wait()
        return fake.obey(FREEZE)

    fake.says[FREEZE] = late
    task = asyncio.create_task(frozen_for_ever(fake))
    await begun.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert fake.frozen == 0


async def test_cancellation_during_the_thaw_is_taken_back(fake: FakeAgent) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> Answer:
        begun.set()
        await go_on.wait()
        return fake.obey(THAW)

    async def freeze_and_thaw() -> None:
        async with freeze.frozen(fake.path):
            pass

    fake.says[THAW] = slow
    task = asyncio.create_task(freeze_and_thaw())
    await begun.wait()
    for _ in range(2):
        task.cancel()
        await asyncio.wait([task], timeout=0)
    assert not task.done()
    go_on.set()
    await task
    assert fake.frozen == 0


async def test_a_dead_switch_is_not_needed(fake: FakeAgent) -> None:
    async with freeze.frozen(fake.path):
        [child] = switches()
        child.kill()
        child.wait()
    assert fake.frozen == 0


async def test_a_stopped_switch_is_not_waited_for(fake: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    async with freeze.frozen(fake.path):
        [child] = switches()
        child.suspend()
        monkeypatch.setattr("qmpmerge.guest.deadman.REPLY_SECONDS", 0.1)
    assert fake.frozen == 0
    assert switches() == []


# --- the thaw is in doubt -------------------------------------------------------------------------------------------


async def test_a_guest_that_does_not_thaw(fake: FakeAgent) -> None:
    fake.always_answers(THAW, refusal("failed to thaw /"))
    with pytest.raises(ThawUnproven, match="MAY STILL BE FROZEN") as raised:
        async with freeze.frozen(fake.path):
            pass
    assert raised.value.facts == {"agent": fake.path, "reason": "failed to thaw /"}
    assert "{" + '"execute":"guest-fsfreeze-thaw"}' in raised.value.hint
    assert raised.value.exit_code == 6
    assert fake.seen[THAW] == 1 + TRIES
    assert switches() == []


async def test_a_thaw_in_doubt_hides_no_error_of_the_block(fake: FakeAgent) -> None:
    fake.always_answers(THAW, refusal("failed to thaw /"))
    with pytest.raises(ThawUnproven) as raised:
        async with freeze.frozen(fake.path):
            raise KeyError
    assert isinstance(raised.value.__context__, KeyError)


async def test_a_connection_that_is_lost_in_the_block(fake: FakeAgent) -> None:
    with pytest.raises(ThawUnproven):
        async with freeze.frozen(fake.path):
            fake.die()
            await fake.is_alone()


async def test_the_switch_thaws_when_we_cannot(fake: FakeAgent) -> None:
    fake.answers(THAW, refusal("busy"))
    with pytest.raises(FreezeUnproven) as raised:
        async with freeze.frozen(fake.path):
            pass
    assert raised.value.facts == {"agent": fake.path, "frozen": 2, "held": 0}
    assert fake.frozen == 0
    assert switches() == []


async def test_a_filesystem_that_was_thawed_in_the_guest(fake: FakeAgent) -> None:
    with pytest.raises(FreezeUnproven, match="of 2 frozen filesystems, 1 were still frozen"):
        async with freeze.frozen(fake.path):
            fake.frozen -= 1


async def test_a_thaw_too_early_hides_no_error_of_the_block(fake: FakeAgent) -> None:
    with pytest.raises(KeyError):
        async with freeze.frozen(fake.path):
            fake.frozen = 0
            raise KeyError


async def test_the_limit_thaws_while_we_live(fake: FakeAgent) -> None:
    with pytest.raises(FreezeUnproven) as raised:
        async with freeze.frozen(fake.path, timeout=1000, limit=0.1):
            await fake.has_seen(THAW)
            assert fake.frozen == 0
    assert raised.value.held == 0


async def test_a_switch_that_is_thawing_is_not_interrupted(fake: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our thaw comes after its, and finds that nothing was frozen any more."""
    begun, asked = asyncio.Event(), asyncio.Event()
    ask = Switch.state

    async def ask_it(switch: Switch) -> Duty:
        assert not fake.more.is_set(), "nobody has written since"
        state = await ask(switch)
        asked.set()
        return state

    async def slow() -> Answer:
        if not begun.is_set():
            fake.more.clear()
            begun.set()
            await asked.wait()
        return fake.obey(THAW)

    fake.says[THAW] = slow
    with pytest.raises(FreezeUnproven):
        async with freeze.frozen(fake.path, limit=0.1):
            await begun.wait()
            monkeypatch.setattr(Switch, "state", ask_it)
    assert fake.seen[THAW] == 2
    assert fake.frozen == 0


# --- we die ---------------------------------------------------------------------------------------------------------

TOOL = """
import asyncio, sys
from qmpmerge import errors
from qmpmerge.guest import freeze

async def main(path, timeout, limit):
    try:
        async with freeze.frozen(path, timeout=float(timeout), limit=float(limit)) as count:
            print(count, flush=True)
            sys.stdin.readline()
    except errors.FreezeUnproven as error:
        print(error.name, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@contextlib.asynccontextmanager
async def frozen_tool(
    path: str, *, timeout: float = PATIENCE, limit: float = PATIENCE
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process of its own that has frozen the guest and stays in the block until it gets a line."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", TOOL, path, str(timeout), str(limit)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(freeze.__file__).parents[2],
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert int(await process.stdout.readline()) > 0
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        process.stdin.close()
        await process.wait()


async def test_our_death_thaws(fake: FakeAgent) -> None:
    async with frozen_tool(fake.path) as tool:
        assert fake.frozen == 2
        tool.kill()
        await fake.has_seen(THAW)
        await fake.is_alone()
    assert fake.frozen == 0


async def test_our_death_thaws_on_the_second_try(fake: FakeAgent) -> None:
    fake.answers(THAW, refusal("busy"))
    async with frozen_tool(fake.path) as tool:
        tool.kill()
        await fake.has_seen(THAW, times=2)
        await fake.is_alone()
    assert fake.frozen == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", HANGS)
async def test_our_death_thaws_a_guest_that_hangs_when_it_wakes(fake: FakeAgent, seconds: float) -> None:
    """However long that takes: who has gone by then has said nothing."""
    asked, wakes = asyncio.Event(), asyncio.Event()

    async def late() -> Answer:
        asked.set()
        await wakes.wait()
        return fake.obey(THAW)

    async with frozen_tool(fake.path, timeout=SHORT) as tool:
        fake.says[THAW] = late
        tool.kill()
        await asked.wait()
        await asyncio.sleep(seconds)
        assert fake.frozen == 2
        wakes.set()
        await fake.has_seen(THAW)
        await fake.is_alone()
    assert fake.frozen == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_signals_to_the_switch_do_not_stop_it(fake: FakeAgent, number: signal.Signals) -> None:
    async with frozen_tool(fake.path) as tool:
        [child] = switches(tool.pid)
        assert os.getsid(child.pid) == child.pid
        child.send_signal(number)
        tool.kill()
        await fake.has_seen(THAW)
        await fake.is_alone()
    assert fake.frozen == 0


async def test_being_stopped_for_too_long_thaws(fake: FakeAgent) -> None:
    async with frozen_tool(fake.path, limit=0.5) as tool:
        tool.send_signal(signal.SIGSTOP)
        await fake.has_seen(THAW)
        assert fake.frozen == 0
        tool.send_signal(signal.SIGCONT)
        output, _ = await tool.communicate(b"\n")
        assert output == b"freeze-unproven\n"
        assert tool.returncode == 0


# --- the real agent, in a real guest --------------------------------------------------------------------------------

MKFS = "mkfs.ext4 -q /dev/vda && mount -t ext4 /dev/vda /mnt"
WRITE = "echo $$ >/run/pid; echo words >/mnt/file"
BLOCKED = "until grep -q ' D ' /proc/$(cat /run/pid)/stat; do usleep 5000; done 2>/dev/null"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def booted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    """A guest with an ext4 on its only disk. One for all these tests, which therefore run in one event loop."""
    image = tmp_path_factory.mktemp("guest") / "disk.raw"
    with image.open("wb") as file:
        file.truncate(32 * 1024 * 1024)
    async with guest([["-drive", f"file={image},format=raw,if=virtio"]]) as vm:
        await vm.run(MKFS)
        yield vm


@pytest_asyncio.fixture(loop_scope="module")
async def mounted(booted: Guest) -> Guest:
    """The guest as it was booted, whatever the test before left there: thawed, the ext4 empty."""
    with await agent.connect(str(booted.agent_socket)) as connection:
        await agent.thaw(agent.Channel(connection), PATIENCE)
    await booted.run("rm -f /mnt/file /run/pid")
    return booted


async def blocked_write(vm: Guest) -> asyncio.Task[str]:
    """A write of the guest's, waiting in the kernel for the thaw."""
    writing = asyncio.create_task(vm.run(WRITE))
    await vm.run(BLOCKED)
    assert not writing.done()
    return writing


@pytest.mark.guest
@pytest.mark.asyncio(loop_scope="module")
async def test_a_real_guest_writes_nothing_in_the_block(mounted: Guest) -> None:
    async with freeze.frozen(str(mounted.agent_socket), timeout=PATIENCE, limit=PATIENCE) as count:
        assert count == 1
        writing = await blocked_write(mounted)
    await writing
    assert await mounted.run("cat /mnt/file") == "words\n"
    assert await mounted.agent(STATUS) == "thawed"


@pytest.mark.guest
@pytest.mark.asyncio(loop_scope="module")
async def test_a_real_agent_gets_over_half_a_command(mounted: Guest) -> None:
    _, writer = await asyncio.open_unix_connection(mounted.agent_socket)
    writer.write(b'{"execute": "guest-info"}\n{"execute": "guest-ex')
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    async with freeze.frozen(str(mounted.agent_socket), timeout=PATIENCE, limit=PATIENCE) as count:
        assert count == 1
    assert await mounted.agent(STATUS) == "thawed"


@pytest.mark.guest
@pytest.mark.asyncio(loop_scope="module")
async def test_a_real_guest_is_thawed_by_our_death(mounted: Guest) -> None:
    async with frozen_tool(str(mounted.agent_socket)) as tool:
        writing = await blocked_write(mounted)
        tool.kill()
        await writing
    assert await mounted.agent(STATUS) == "thawed"


@pytest.mark.guest
@pytest.mark.asyncio(loop_scope="module")
async def test_a_real_guest_that_thawed_by_itself_is_noticed(mounted: Guest) -> None:
    with pytest.raises(FreezeUnproven, match="of 1 frozen filesystems, 0 were still frozen"):
        async with freeze.frozen(str(mounted.agent_socket), timeout=PATIENCE, limit=PATIENCE):
            await mounted.run("fsfreeze --unfreeze /mnt")
