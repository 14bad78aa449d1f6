"""What is asked of a merge that it cannot do: said beforehand."""

import pytest
from rig.command import JOB, invoke
from rig.disks import Setup

import qmpmerge
from qmpmerge.errors import ActiveOnly, StillRunning


@pytest.mark.parametrize("dry_run", [True, False])
async def test_an_ending_of_active_merges_is_refused_for_a_top_below(setup: Setup, dry_run: bool) -> None:
    async with setup.target() as target:
        with pytest.raises(ActiveOnly, match="--keep-overlay") as refused:
            await qmpmerge.commit(target, top="[3]", ending="keep", dry_run=dry_run)
        assert str((await target.chain()).chain) == "base.raw <-- a.qcow2 <-- b.qcow2 <-- c.qcow2"
        with pytest.raises(ActiveOnly, match=r"`--keep 0`"):
            await qmpmerge.commit(target, keep=1, ending="keep", dry_run=dry_run)
    assert refused.value.top.endswith("/b.qcow2") and "without `--top`" in refused.value.hint
    assert setup.machine.session.execute("query-jobs") == []


async def test_so_it_is_where_a_job_is_followed(setup: Setup) -> None:
    async with setup.target() as target:
        with pytest.raises(StillRunning):
            await qmpmerge.commit(target, top="[3]", speed=1, patience=qmpmerge.Patience(detach=True))
        with pytest.raises(ActiveOnly):
            await qmpmerge.follow(target, JOB, ending="keep")
    (job,) = setup.machine.session.execute("query-block-jobs")
    assert job["device"] == JOB


@pytest.mark.parametrize("command", [["commit", "{}"], ["job", "{}", JOB, "follow"]])
@pytest.mark.parametrize("flags", [["--pivot", "--keep-overlay"], ["--keep-overlay", "--hold"], ["--hold", "--pivot"]])
def test_two_endings_are_a_mistake(setup: Setup, command: list[str], flags: list[str]) -> None:
    said = invoke(*(word.format(setup.machine.target) for word in command), *flags)
    assert said.code == 2 and all(flag in said.err for flag in flags)
    assert setup.machine.session.execute("query-jobs") == []
