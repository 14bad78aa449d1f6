"""One operation under way: its state, its record, and the only place where either is changed."""

import errno
import logging
import os
import time
from dataclasses import dataclass, field, replace

from qmpmerge.chain.chain import Chain, Image
from qmpmerge.chain.outcome import MergedFile
from qmpmerge.chain.plan import CommitPlan
from qmpmerge.chain.state import NEXT, RECORDED, State
from qmpmerge.engine.operation import Operation
from qmpmerge.engine.progress import Report
from qmpmerge.engine.rates import Watch
from qmpmerge.engine.request import Request
from qmpmerge.errors import CannotRecord, JobFailed, NotDurable, NotVerified
from qmpmerge.guest.deadman import Switch
from qmpmerge.images import compare
from qmpmerge.images.files import Seen
from qmpmerge.journal import merged_files, record, stash, store
from qmpmerge.journal.locks import Lock
from qmpmerge.journal.record import Record
from qmpmerge.processes import proc
from qmpmerge.qemu import flush, jobs
from qmpmerge.qemu.bitmaps import Bitmap
from qmpmerge.qemu.blockgraph import Disk
from qmpmerge.targets.target import ChainView, Host

log = logging.getLogger("qmpmerge")

_ORDER = list(State)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass
class Run:
    """
    One operation on the chain of `disk`, under `lock`. `speed` is None where its job is there already.

    `suspect` is the error of an earlier merge into the same base: what the base shows must be compared. `is_started` says
    that QEMU has confirmed the start, `let_go` that the overlay is kept, `past_return` that the job may have been told to
    end. `old_nodes` are those that the operation leaves open, top down. `notes` are sentences for the user.
    """

    host: Host
    disk: Disk
    operation: Operation
    request: Request
    report: Report
    lock: Lock
    job: str
    old_nodes: tuple[str, ...]
    base_driver: str
    speed: int | None = None
    bitmaps: tuple[Bitmap, ...] = ()
    state: State = State.PLANNED
    record: Record | None = None
    is_started: bool = True
    let_go: bool = False
    past_return: bool = False
    verify: bool | None = None
    verified: bool = False
    suspect: str | None = None
    base_is_durable: bool = False
    deadman: Switch | None = None
    paused_ms: float | None = None
    copied: int | None = None
    notes: list[str] = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(
        cls, host: Host, view: ChainView, operation: Operation, request: Request, *, report: Report, lock: Lock
    ) -> "Run":
        """One whose job is to be started."""
        run = cls.resume(host, view, operation, request, report=report, lock=lock)
        run.speed, run.is_started = request.speed, False
        return run

    @classmethod
    def resume(
        cls,
        host: Host,
        view: ChainView,
        operation: Operation,
        request: Request,
        *,
        report: Report,
        lock: Lock,
        record: Record | None = None,
    ) -> "Run":
        """
        One that was begun before: its job is at work, or `record` says that it has ended well, and nobody has proved it.

        Images are known by their files: the QEMU that has them now may have been started since, and call its nodes
        otherwise.
        """
        plan, layout = operation.plan, view.layout
        if record is not None and record.is_done(view.chain):
            there = set(layout.subtree(view.disk.root))
            job, driver = record.job, record.base_driver
            old_nodes = [node for node in record.old_nodes if node not in there]
        else:
            job = view.disk.job.id if view.disk.job else jobs.job_id(view.disk.name)
            driver = layout.nodes[plan.base.node or ""].driver
            old_nodes = layout.between(plan.top.node or "", plan.base.node or "")
        suspect = lock.note.suspect
        return cls(
            host=host,
            disk=view.disk,
            operation=operation,
            request=request,
            report=report,
            lock=lock,
            job=job,
            old_nodes=tuple(old_nodes),
            base_driver=driver,
            record=record,
            verify=request.compares if suspect is None else True,
            suspect=suspect,
        )

    @property
    def plan(self) -> CommitPlan:
        """What is carried out."""
        return self.operation.plan

    @property
    def deadline(self) -> float | None:
        """Until when we wait, in `time.monotonic` seconds."""
        return self.request.patience.deadline

    def name_after(self, expected: Chain) -> str:
        """What the disk is called once its active image may have changed."""
        return self.disk.drive or self.disk.qdev or expected.active.node or expected.active.file

    async def flush(self, image: Image) -> bool:
        """As `flush.flush` does."""
        return await flush.flush(self.host.monitor, image, opened=self.host.opened.get(image.node or ""))

    # --- states ---------------------------------------------------------------------------------------------------

    def enter(self, state: State, *, seen: dict[int, Seen] | None = None) -> None:
        """
        The operation is in this state from now on: in its record first (durable after `sync`), then in memory.

        A record never goes back: what may have been done stays written down. Raises OSError where it cannot be marked, and
        then the state was not entered; ValueError for a step that `NEXT` does not allow, which is a bug of ours.
        """
        if state is not self.state and state not in NEXT[self.state]:
            raise ValueError(f"{self.state.name} does not lead to {state.name}")
        known = self.record
        if known is not None and state in RECORDED and _ORDER.index(state) >= _ORDER.index(known.state):
            marked = replace(known, state=state, verified=self.verified, seen=known.seen if seen is None else seen)
            self.record = marked if marked == known else store.mark(marked)
        log.info("%s: %s to %s", self.job, self.state.value, state.value)
        self.state = state

    def write_down(self) -> None:
        """
        PLANNED to COPYING: what is about to be done is written, whole and durable, before the job is started.

        Where there is no place for a record, or none that we may write to, the operation goes on without, and says what
        cannot be promised. Raises CannotRecord where there is one, and writing fails.
        """
        path = self._place()
        try:
            if not path:
                raise PermissionError(errno.EPERM, "no image of it is a regular file")
            self.record = store.write(self._new_record(path))
            self.lock.point_to(path)
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno not in _NOT_ALLOWED:
                raise CannotRecord(path=path, reason=reason) from None
            self.record = None
            if self.operation.pivots:
                self.notes.append(
                    f"no record could be kept beside {self.plan.chain.active.file} ({reason}): had this host died during "
                    f"the pivot, nobody could tell which image holds the last writes"
                )
        self.enter(State.COPYING)

    def sync(self) -> None:
        """Make durable what was written down, and the names of the files beside the record. Raises OSError."""
        if self.record is not None:
            store.sync(self.record)

    def undone(self, error: BaseException) -> None:
        """
        To UNDONE, after `error`: the old chain was proved to be in use. The active image has its name again, and the record
        goes; the lock still says so where base is suspect.
        """
        if State.UNDONE not in NEXT[self.state] or not self._names_given_back():
            return
        self._forget_record()
        suspect = self.suspect or _suspicion(error)
        if suspect is None:
            self.lock.clear()
        else:
            self.lock.suspect(suspect)
        self.enter(State.UNDONE)

    async def finish(self, state: State) -> tuple[MergedFile, ...]:
        """
        To PROVED and DONE, or to KEPT: all is proved and durable. Deals with the merged files; then nothing remains, and
        the record goes.
        """
        merged: list[MergedFile] = []
        if state is State.KEPT:
            self._names_given_back()
        else:
            merged = await self._files_dealt_with()
        self._forget_record()
        self.lock.clear()
        self.enter(state)
        return tuple(merged)

    def close(self) -> None:
        """The dead man's switch goes; whoever comes next finds the record, if there still is one."""
        if self.deadman is not None:
            self.deadman.close()
            self.deadman = None

    # --- the record -----------------------------------------------------------------------------------------------

    def _place(self) -> str:
        """Where the record lies, or is to lie; empty where there is no place for it."""
        chain = self.plan.chain
        return self.record.path if self.record is not None else store.place_of(chain, chain.index(self.plan.base))

    def _new_record(self, path: str) -> Record:
        """What to write down; of one that was begun before, with what its record knows."""
        plan, host = self.plan, self.host
        base, top = plan.chain.index(plan.base), plan.chain.index(plan.top)
        new = Record(
            path=path,
            target=_address(host.target),
            disk=self.disk.name,
            device=self.disk.drive or self.disk.qdev,
            job=self.job,
            chain=plan.chain,
            base=base,
            top=top,
            policy=self.request.merged_files,
            qemu=proc.process(host.pid) if host.pid is not None else None,
            tool=proc.process(os.getpid()),
            is_live=host.is_live,
            since=time.time(),
            old_nodes=self.old_nodes,
            base_driver=self.base_driver,
            away={} if self.request.merged_files == "keep" else stash.names_away(plan.chain, base, top),
            before=record.looks(plan.chain, range(base + 1, top + (plan.overlay is not None))),
        )
        return new if self.record is None else _continued(new, self.record)

    def _names_given_back(self) -> bool:
        if self.record is not None:
            try:
                merged_files.give_back(self.record, self.record.top)
            except OSError as error:
                self.notes.append(f"{self.plan.top.file} could not get its name back: {error.strerror or error}")
                return False
        return True

    async def _files_dealt_with(self) -> list[MergedFile]:
        try:
            self.enter(State.SWITCHED)
            self.enter(State.PROVED)
            self.sync()
        except OSError as error:  # what was written before tells enough
            self.notes.append(f"the record cannot be written: {error.strerror or error}")
            self.state = State.PROVED
        known = self.record or self._new_record("")
        done, hints = await merged_files.finish(replace(known, verified=self.verified))
        self.notes += hints
        return done

    def _forget_record(self) -> None:
        if self.record is not None:
            try:
                store.remove(self.record)
            except OSError as error:
                self.notes.append(f"{self.record.path} cannot be removed: {error.strerror or error}")
            self.record = None


def _suspicion(error: BaseException) -> str | None:
    """
    The reason where after this failure base may not hold what QEMU believes: not where somebody cancelled the job, or
    where base and top could not be compared.
    """
    if isinstance(error, NotVerified):
        return error.reason if error.reason == compare.DIFFERENT else None
    if isinstance(error, JobFailed | NotDurable):
        return error.reason if error.reason != jobs.CANCELED else None
    return None


def _continued(new: Record, known: Record) -> Record:
    """
    It knows the files by their inodes. Where the job was told to complete, maybe, the name stays away until it is known
    what came of it.
    """
    away, before = {**new.away, **known.away}, {**new.before, **known.before}
    return replace(
        new, chain=known.chain, away=away, before=before, state=known.state, seen=known.seen, since=known.since
    )


def _address(target: str) -> str:
    """What the user called the host, so that it means the same from every folder."""
    path = target.removeprefix("unix:")
    return os.path.abspath(path) if os.path.lexists(path) else target
