"""One operation under way: its state, its record, and the only place where either is changed."""

import asyncio
import contextlib
import errno
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from qmpmerge import folder
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.chain.outcome import Checked, MergedFile
from qmpmerge.chain.plan import Plan
from qmpmerge.chain.state import NEXT, RECORDED, State
from qmpmerge.engine import background, first_record, log
from qmpmerge.engine.operation import Operation
from qmpmerge.engine.pace.course import Course
from qmpmerge.engine.pace.progress import Progress, Report, ReportRaised, unreported
from qmpmerge.engine.pace.rates import Watch
from qmpmerge.engine.request import Request
from qmpmerge.errors import CannotRecord, CannotRecover, Damaged, JobFailed, MaybeDamaged, NotDurable, NotVerified
from qmpmerge.folder import File
from qmpmerge.guest.deadman import Switch
from qmpmerge.images import compare
from qmpmerge.images.files import Seen
from qmpmerge.images.qcow2 import Qcow2Header
from qmpmerge.journal import locks, merged_files, spared, store
from qmpmerge.journal.locks import Lock
from qmpmerge.journal.record import Record
from qmpmerge.qemu import jobs
from qmpmerge.qemu.bitmaps import Bitmap
from qmpmerge.qemu.blockgraph import Disk, Layout
from qmpmerge.qemu.jobs import Job
from qmpmerge.qemu.monitor import Monitor
from qmpmerge.targets.target import ChainView, Target

_ORDER = list(State)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass
class Run:
    """
    One operation on a chain, under `lock`. `carrier` is where it is carried out and `shown` the disk there; both are None
    where they are gone, and only files are left to be dealt with; `target_name` is what that is, or was, called. `before` is
    what was to be seen when it was begun, in this `session`. `speed` is None where its job is there already.

    `suspect` is the error of an earlier merge into the same base: what the base shows must be compared. `doubts` are those
    about what earlier jobs have copied (`spared.doubts`). `is_sent` says that the job may have been started, `is_started` that
    QEMU has confirmed it, `let_go` that the overlay is kept, `past_return` that the job may have been told to end,
    `has_ended_well` that it was seen to end without an error. `old_nodes` are those that the operation leaves open, top
    down. `top_header` is that of top right before a pivot of ours. `seen` is the job as it was seen last, `course` what it
    has to copy, where that was found out, `mask` what of it is to be compared, `copies` what a pull copies, or base has
    held, where it is to be compared, or why that is not known. `concluded` is the record that is gone, as all was
    done. `notes` are sentences for the user.
    """

    operation: Operation
    request: Request
    lock: Lock
    carrier: Target | None
    target_name: str
    shown: Disk | None
    before: ChainView | None
    session: Monitor | None
    report: Report
    job: str
    old_nodes: tuple[str, ...]
    base_driver: str
    speed: int | None = None
    bitmaps: tuple[Bitmap, ...] = ()
    checks: tuple[Checked, ...] = ()
    state: State = State.PLANNED
    record: Record | None = None
    concluded: Record | None = None
    is_sent: bool = True
    is_started: bool = True
    let_go: bool = False
    past_return: bool = False
    has_ended_well: bool = False
    verify: bool | None = None
    verified: bool = False
    suspect: str | None = None
    doubts: Mapping[int, str] = field(default_factory=dict)
    receiver_is_durable: bool = False
    deadman: Switch | None = None
    paused_seconds: float | None = None
    top_header: Qcow2Header | None = None
    seen: Job | None = None
    course: Course | None = None
    mask: File | None = None
    copied: int | None = None
    copies: compare.Shown | str = "an earlier run has begun it, and what the image held before is not known"
    notes: list[str] = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)
    _recording: asyncio.Future[None] | None = None
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(
        cls, target: Target, operation: Operation, request: Request, lock: Lock, *, view: ChainView, report: Report
    ) -> "Run":
        """One whose job is to be started."""
        run = cls.resume(target, operation, request, lock, view=view, report=report)
        run.speed, run.is_sent, run.is_started = request.speed or 0, False, False
        above = run.old_nodes[: run.old_nodes.index(run.plan.top.node or "")]
        run.notes += [f"node {node}, a filter above what was merged, went with it" for node in above]
        return run

    @classmethod
    def resume(
        cls,
        target: Target | None,
        operation: Operation,
        request: Request,
        lock: Lock,
        *,
        view: ChainView | None = None,
        record: Record | None = None,
        state: State = State.PLANNED,
        report: Report = unreported,
    ) -> "Run":
        """
        One that was begun before. Either its job is at work, or `record` says that it has ended well and nobody has proved
        it: then `view` shows the disk, and `go` goes on from there. Or it was left, and `state` is what the evidence says of
        it: then only `finish` and `undone` are to come.

        Images are known by their files: the QEMU that has them now may have been started since, and call its nodes
        otherwise. What becomes of the merged files is as the record has it, where `request` does not say. Raises ForeignFile.
        """
        if view is not None and record is not None:
            from qmpmerge.recovery import claims  # most runs have no record before they write it

            claims.refuse_foreign(record, ("back", "finish"), claims.Vouched.by(view.chain, target))
        if view is None or (record is not None and record.is_done(view.chain)):
            assert record is not None, "what has nothing to show was written down"
            there = set() if view is None else set(view.layout.subtree(view.disk.root))
            job, driver = record.job, record.base_driver
            old_nodes = [node for node in record.old_nodes if node not in there]
        else:
            plan, layout = operation.plan, view.layout
            job = view.disk.job.id if view.disk.job else jobs.job_id(view.disk.name, plan.direction)
            below = plan.base.node or "" if plan.base is not None else None
            driver = layout.nodes[below].driver if below is not None else ""
            filters = layout.filters_below(view.disk, plan.overlay) if plan.overlay is not None else []
            old_nodes = [*filters, *layout.between(plan.top.node or "", below)]
        suspect = lock.note.suspect
        if record is not None and request.merged_files is None:
            request = replace(request, merged_files=record.policy)
        return cls(
            operation=operation,
            request=request,
            lock=lock,
            carrier=target,
            target_name=target.name if target is not None else record.target if record is not None else "",
            shown=view.disk if view is not None else None,
            before=view,
            session=target.monitor if target is not None else None,
            report=report,
            job=job,
            old_nodes=tuple(old_nodes),
            base_driver=driver,
            state=state,
            record=record,
            verify=request.compares if suspect is None else True,
            verified=record is not None and record.verified and state is State.SWITCHED,
            suspect=suspect,
            doubts=spared.doubts(operation.plan),
        )

    @property
    def target(self) -> Target:
        """Where it is carried out."""
        assert self.carrier is not None, "only files are left to be dealt with"
        return self.carrier

    @property
    def disk(self) -> Disk:
        """The disk there."""
        assert self.shown is not None, "only files are left to be dealt with"
        return self.shown

    @property
    def plan(self) -> Plan:
        """What is carried out."""
        return self.operation.plan

    def images(self) -> Iterable[Image]:
        """Those of the chain as it was, by the names that they have now, and without those that are gone."""
        record = self.record or self.concluded
        return self.plan.chain if record is None else record.found()

    @property
    def is_all_verified(self) -> bool:
        """Whether that holds of what earlier jobs have copied up too."""
        return self.verified and not self.doubts

    @property
    def may_be_deleted(self) -> bool:
        """Whether hints may say how to delete what leaves: not what may be needed, as it was not compared."""
        return not self.doubts and (self.verified or self.request.policy(self.plan) != "delete")

    @property
    def known(self) -> Layout | None:
        """
        The graph as it was before, as long as the session is the same, and its images are whole files: of others QEMU has to
        tell the headers, and which part of a file they are now.
        """
        if self.before is None or self.target.monitor is not self.session:
            return None
        are_files = all(image.has_path and image.slice is None for image in self.before.chain)
        return self.before.layout if are_files else None

    @property
    def deadline(self) -> float | None:
        """Until when we wait, in `time.monotonic` seconds."""
        return self.request.patience.deadline

    def is_to_be_held(self, job: Job) -> bool:
        """Whether the job, as it is, is to be left: all is copied, and nothing switched."""
        return self.request.ending == "hold" and job.status == self.operation.holds_at

    def name_after(self, expected: Chain) -> str:
        """What the disk is called once its active image may have changed."""
        return self.disk.drive or self.disk.qdev or expected.active.node or expected.active.file

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
            marked = replace(
                known, state=state, verified=self.is_all_verified, seen=known.seen if seen is None else seen
            )
            self.record = marked if marked == known else store.mark(marked)
        if state is not self.state:
            self.log("state", "{was} to {state}", was=self.state.value, state=state.value)
        self.state = state

    def leave(self) -> None:
        """To LEFT, where that is allowed. That a job is ready, which anybody can tell to move the guest, is written down."""
        if State.LEFT not in NEXT[self.state]:
            return
        is_recorded = self.record is not None and self._recording is None  # else its storage hangs
        if is_recorded and self.operation.pivots and self.seen is not None and self.seen.ready:
            assert self.record is not None, "it is recorded"
            try:
                self.record = store.mark(replace(self.record, was_left_ready=True))
            except OSError as error:
                self.notes.append(f"the record cannot be written: {error.strerror or error}")
        self.enter(State.LEFT)

    def tell(self, progress: Progress) -> None:
        """Report it. Raises ReportRaised."""
        try:
            self.report(progress)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            raise ReportRaised(error) from None

    def log(self, step: str, text: str, **facts: object) -> None:
        """Tell of a step: see `log.step`."""
        log.step(step, text, about=self.job, target=self.target_name, **facts)

    def write_down(self) -> None:
        """
        PLANNED to COPYING: what is about to be done is written, whole and read back, before the job is started. It is
        durable after `recorded`, for which nobody waits while QEMU copies, but see `recorded_before`.

        Until SAFE that is enough. QEMU only adds to the receiver what the images above show, or what it shows itself; headers
        and names are what they were. So where a power cut takes the record's name back, the old chain is right by its headers
        alone, as if nothing had been begun; and what is done to QEMU for the time of the copy (bitmaps that follow a guest's
        writes, throttling) has ended with it.

        Where there is no place for a record, or none that we may write to, the operation goes on without, and says what
        cannot be promised. Raises CannotRecord where there is one, and writing fails; and where there is a record of this
        operation already, for it would tell of less than is done.
        """
        path, known = self._place(), self.record
        folder.renaming()  # nothing is loaded once the job is at work
        try:
            if not path:
                raise PermissionError(errno.EPERM, "no image of it is a regular file")
            self.record = store.put(first_record.of_run(self, path))
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno not in _NOT_ALLOWED or self.record is not None:
                raise CannotRecord(path=str(error.filename or path), reason=reason) from None
            if self.operation.pivots:
                self.notes.append(
                    f"no record could be kept beside {self.plan.chain.active.file} ({reason}): had this host died during "
                    f"the pivot, nobody could tell which image holds the last writes"
                )
        self._point_to_record(is_new=known is None)
        if self.record is not None:
            self.log("record", "{record} says what is begun", record=self.record.path)
        self.enter(State.COPYING)
        self._recording = background.begun(self._make_record_durable)

    def _make_record_durable(self) -> None:
        self.sync()
        self.lock.sync()

    async def recorded(self, within: float | None = None) -> bool:
        """
        Wait until what was written down before the job is durable, which it must be before anything is done that only it
        explains, and before anything else is done to the files of record and lock. False where the storage has not answered
        `within` so many seconds. Raises OSError, once, where it is not durable.
        """
        if self._recording is not None:
            if not (await asyncio.wait([self._recording], timeout=within))[0]:
                return False
            recording, self._recording = self._recording, None
            recording.result()
            self.log("recorded", "what is begun is recorded durably")
        return True

    async def recorded_before(self) -> None:
        """
        The same before the job, where what it copies from further below counts as the receiver's own data afterwards: who
        finds that without a record does not know that it was never compared. Raises CannotRecord.
        """
        if self.plan.direction == "commit" and self.plan.base_index == 1:
            return
        try:
            await self.recorded()
        except OSError as error:
            raise CannotRecord(
                path=str(error.filename or self.lock.path), reason=error.strerror or str(error)
            ) from None

    def _point_to_record(self, *, is_new: bool) -> None:
        """The note in the lock, and with it the room for what may have to be noted of base. Raises CannotRecord."""
        try:
            self.lock.point_to(self.record.path if self.record is not None else None)
        except OSError as error:
            if is_new and self.record is not None:
                with contextlib.suppress(OSError):
                    store.remove(self.record)
            raise CannotRecord(path=self.lock.path, reason=error.strerror or str(error)) from None

    def proved(self) -> None:
        """To SWITCHED and PROVED, durably. Raises OSError."""
        self.enter(State.SWITCHED)
        self.enter(State.PROVED)
        self.sync()

    def sync(self) -> None:
        """Make durable what was written down, and the names of the files beside the record. Raises OSError."""
        if self.record is not None:
            store.sync(self.record)

    def undone(self, error: BaseException | None = None) -> None:
        """To UNDONE, after `error`, since the old chain was proved to be in use: names come back, and the record goes."""
        if State.UNDONE not in NEXT[self.state] or not self._names_given_back():
            return
        if self.is_sent and (self.plan.direction == "pull" or compare.fills(self.plan)):
            self._note_partial()
        self._forget_record(_suspicion(error) or self.suspect, self.lock.note.damaged, self.lock.note.partial)
        self.enter(State.UNDONE)

    def _note_partial(self) -> None:
        with contextlib.suppress(
            OSError
        ):  # its room was taken before the job was started; the note is written once more
            self.lock.partial(self.plan.receiver)

    def give_names_back(self) -> None:
        """The merged images get their own names back. Raises OSError, CannotRecover where one is under neither of its names."""
        if self.record is None:
            return
        for index in self.record.away:
            if self.record.place(index) is None:
                reason = "it is neither there nor under its stashed name"
                raise CannotRecover(file=self.record.chain[index].file, reason=reason)
            if merged_files.give_back(self.record, index):
                self.log("renamed", "{now} has its name back", now=self.record.chain[index].file)

    def finish(self, state: State) -> tuple[MergedFile, ...]:
        """
        To PROVED and DONE, or to KEPT: all is proved and durable. Deals with the merged files; then the record goes, and
        `record` is still set where it could not be removed.
        """
        merged: list[MergedFile] = []
        is_whole = self.plan.result.images[0].same_as(self.plan.receiver)
        if self.doubts and not is_whole:
            self._note_partial()
        if state is State.KEPT:
            self._names_given_back()
        else:
            merged = self._files_dealt_with()
        damaged = None if "doubtful" in self.request.force else self.lock.note.damaged
        self.notes += spared.unchecked(self.plan, self.doubts)
        partial = None if is_whole else self.lock.note.partial
        self._forget_record(None if self.verified else self.suspect, damaged, partial)
        self.enter(state)
        return tuple(merged)

    def close(self) -> None:
        """The dead man's switch goes; whoever comes next finds the record, if there still is one."""
        if self.deadman is not None:
            self.deadman.close()
            self.deadman = None

    def _place(self) -> str:
        """Where the record lies, or is to lie; empty where there is no place for it."""
        chain = self.plan.chain
        return self.record.path if self.record is not None else store.place_of(chain, self.plan.base_index)

    def _names_given_back(self) -> bool:
        try:
            self.give_names_back()
        except (OSError, CannotRecover) as error:
            self.notes.append(f"the merged images could not get their names back: {error}")
            return False
        return True

    def _files_dealt_with(self) -> list[MergedFile]:
        if self.state is not State.PROVED:
            try:
                self.proved()
            except OSError as error:  # what was written before tells enough
                self.notes.append(f"the record cannot be written: {error.strerror or error}")
                self.state = State.PROVED
        known = self.record or first_record.of_run(self, "")
        done, hints = merged_files.finish(
            replace(known, verified=self.is_all_verified), self.doubts, self.request.search
        )
        self.notes += hints
        for file in done:
            self.log(
                "merged-file", "{file}: {action}, now {now}", file=file.file, action=file.action, now=file.now or "gone"
            )
            if file.action != "keep":
                locks.forget_image(file.file)
        return done

    def _forget_record(self, suspect: str | None, damaged: int | None, partial: int | None) -> None:
        """Nothing remains but what is to be said of the receiver, if anything; or the record, where it cannot be removed."""
        try:
            if self.record is not None:
                store.remove(self.record)
                self.concluded = self.record
            self.record = None
        except OSError as error:
            self.notes.append(f"the record cannot be removed: {error.strerror or error}")
        try:
            if self.record is None:
                self.lock.conclude(suspect, damaged=damaged, partial=partial)
            elif suspect is not None:
                self.lock.suspect(suspect)
        except OSError as error:  # its room was taken before the job was started
            self.notes.append(
                f"{self.lock.path} cannot be written ({error.strerror or error}): compare with `--verify`"
            )


def _suspicion(error: BaseException | None) -> str | None:
    """
    The reason where after this failure base may not hold what QEMU believes: not where somebody cancelled the job, or
    where base and top could not be compared.
    """
    if isinstance(error, Damaged | MaybeDamaged):
        return compare.DIFFERENT
    if isinstance(error, NotVerified):
        return error.reason if error.reason == compare.DIFFERENT else None
    if isinstance(error, JobFailed | NotDurable):
        return error.reason if error.reason != jobs.CANCELED else None
    return None
