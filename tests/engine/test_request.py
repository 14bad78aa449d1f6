"""What is asked of a merge that it cannot do: said beforehand, since an intermediate merge cannot be taken back."""

import pytest
from rig.command import JOB, invoke
from rig.disks import Setup

import qmpmerge
from qmpmerge.chain.outcome import Ending
from qmpmerge.errors import ActiveOnly, StillRunning

OPTIONS = {"keep": "--keep-overlay", "ready": "--wait-ready"}


@pytest.mark.parametrize("ending", OPTIONS)
@pytest.mark.parametrize("dry_run", [True, False])
async def test_an_ending_of_active_merges_is_refused_for_a_top_below(
    setup: Setup, ending: Ending, dry_run: bool
) -> None:
    async with setup.target() as target:
        with pytest.raises(ActiveOnly, match=OPTIONS[ending]) as refused:
            await qmpmerge.commit(target, top="[3]", ending=ending, dry_run=dry_run)
        assert str((await target.chain()).chain) == "base.raw <-- a.qcow2 <-- b.qcow2 <-- c.qcow2"
        with pytest.raises(ActiveOnly, match=r"`--keep 0`"):
            await qmpmerge.commit(target, keep=1, ending=ending, dry_run=dry_run)
    assert refused.value.top.endswith("/b.qcow2") and "without `--top`" in refused.value.hint
    assert setup.machine.session.execute("query-jobs") == []


@pytest.mark.parametrize("ending", OPTIONS)
async def test_so_it_is_where_a_job_is_followed(setup: Setup, ending: Ending) -> None:
    async with setup.target() as target:
        with pytest.raises(StillRunning):
            await qmpmerge.commit(target, top="[3]", speed=1, patience=qmpmerge.Patience(detach=True))
        with pytest.raises(ActiveOnly):
            await qmpmerge.follow(target, JOB, ending=ending)
    (job,) = setup.machine.session.execute("query-block-jobs")
    assert job["device"] == JOB


@pytest.mark.parametrize("command", [["commit", "{}"], ["job", "{}", JOB, "follow"]])
@pytest.mark.parametrize(
    "flags", [["--pivot", "--keep-overlay"], ["--keep-overlay", "--wait-ready"], ["--wait-ready", "--pivot"]]
)
def test_two_endings_are_a_mistake(setup: Setup, command: list[str], flags: list[str]) -> None:
    said = invoke(*(word.format(setup.machine.target) for word in command), *flags)
    assert said.code == 2 and all(flag in said.err for flag in flags)
    assert setup.machine.session.execute("query-jobs") == []
