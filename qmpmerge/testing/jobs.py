"""A block job, held where a tool is to find it."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qmpmerge.testing.machines import SECONDS
from qmpmerge.testing.vms import Disk, StartVm, Vm

Status = Literal["running", "paused", "ready", "standby", "pending", "concluded"]
Kind = Literal["commit", "commit-active", "stream"]

READY = ("ready", "standby")
PASSED = {"created": 0, "running": 1, "paused": 1, "ready": 2, "standby": 2, "waiting": 3, "pending": 4, "concluded": 5}
"""How far a job is that has a status: it never goes back."""
HELD = {"running": "running", "paused": "running", "ready": "ready", "standby": "ready"}
"""What is waited for before the job is told to pause."""


@dataclass(frozen=True)
class Job:
    """A job of QEMU's, by its `id`."""

    id: str
    kind: Kind
    vm: Vm

    def query(self) -> dict[str, Any]:
        """What ``query-jobs`` says of it; raises AssertionError where it is gone."""
        found: list[dict[str, Any]] = [job for job in self.vm.session.execute("query-jobs") if job["id"] == self.id]
        assert found, f"{self.id} is gone"
        return found[0]

    @property
    def status(self) -> str:
        """As it is now."""
        return str(self.query()["status"])

    def wait_for(self, status: str) -> None:
        """
        Wait until it is in this state. Raises ValueError where there is no such state, and AssertionError where the job is past
        it, or has not got on for a minute.
        """
        known("status", status, PASSED)
        before, since = "", time.monotonic()
        while (job := self.query())["status"] != status:
            past = PASSED.get(job["status"], len(PASSED)) > PASSED[status]
            assert not past, f"{job} instead of {status}: was there nothing to copy?"
            if before != str(job):
                before, since = str(job), time.monotonic()
            assert time.monotonic() - since < SECONDS, f"{job} does not get on, and is not {status}"


class FreezeJob:
    """Starts jobs on the test's VMs and holds them."""

    def __init__(self, vms: StartVm) -> None:
        self._vms = vms

    def __call__(
        self,
        status: Status,
        *,
        kind: Kind | None = None,
        id: str = "frozen",
        disk: str | None = None,
        vm: Vm | None = None,
    ) -> Job:
        """
        A job that is in this state, and stays there until somebody does something about it.

        ``running`` is throttled to a byte a second after a first MiB, and there must be more than that to copy, as there is in
        the layers that `MakeChain` fills where nothing else is asked for; ``paused`` and ``standby`` were paused by a user;
        ``pending`` waits for its ``job-finalize``, ``concluded`` for its ``job-dismiss``. The kind is ``commit`` (the images
        between the active one and the base, into the base), ``commit-active`` (all of them; only this one is ever ready) or
        ``stream`` (all into the active one). Where there are several disks, or VMs, say which.
        Raises ValueError for what is no status or kind, AssertionError where the job cannot get there.
        """
        known("status", status, get_args(Status))
        known("kind", kind or "commit", get_args(Kind))
        vm = self._vms.only(vm)
        one = vm.disk(disk)
        kind = kind or ("commit-active" if status in READY or len(one.layers) < 3 else "commit")
        assert kind == "commit-active" or status not in READY, f"a {kind} job is never {status}"
        assert kind != "commit-active" or status != "pending", "that would stop the guest's I/O: take another kind"
        _start(vm, one, kind, id, status)
        job = Job(id, kind, vm)
        if status == "concluded" and kind == "commit-active":
            job.wait_for("ready")
            vm.session.execute("job-complete", id=id)
        job.wait_for(HELD.get(status, status))
        if status in ("paused", "standby"):
            vm.session.execute("job-pause", id=id)
            job.wait_for(status)
        return job


def known(what: str, word: str, words: Collection[str]) -> None:
    """See that a word of the test's author is one of those that are understood. Raises ValueError, which has them."""
    if word not in words:
        raise ValueError(f"{what} is {word!r}, and not one of {', '.join(words)}")


def _start(vm: Vm, disk: Disk, kind: Kind, name: str, status: Status) -> None:
    images = disk.layers.images
    options: dict[str, object] = {"job_id": name, "device": disk.root, "auto_dismiss": False}
    options |= {"speed": 1} if status in ("running", "paused") else {}
    options |= {"auto_finalize": False} if status == "pending" else {}
    if kind == "stream":
        vm.session.execute("block-stream", **options)
        return
    assert len(images) >= (3 if kind == "commit" else 2), f"{len(images)} images are too few for a {kind} job"
    options |= disk.image("base", images[0])
    options |= disk.image("top", images[-2]) if kind == "commit" else {}
    vm.session.execute("block-commit", **options)
