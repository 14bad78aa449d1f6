"""Errors of a merge that was begun: it failed, or is not proven."""

import contextlib
import shlex
from collections.abc import Iterator

from qmpmerge.errors.base import Failed, Unknown, Untouched


class JobFailed(Failed):
    """QEMU ended the job with an error."""

    job: str
    reason: str
    sentence = "job {job} failed: {reason}; the old chain is in use and nothing is lost"
    advice = "fix the cause, then run the same command again"


class OutOfQuota(JobFailed):
    """The storage of base refused a write because of a quota; unlike a full disk that ends the job."""

    filesystem: str
    sentence = "job {job} failed: {reason} on {filesystem}; the old chain is in use and nothing is lost"
    advice = "raise the quota there of the user that QEMU runs as, then run the same command again"


class DaemonEnded(Failed):
    """The storage daemon of an offline merge, which is our own, was killed before anything was switched."""

    reason: str
    sentence = "the storage daemon that did the work is gone: {reason}; nothing was switched, the old chain is right"
    advice = "see who ended it (the kernel does, where memory runs out: `dmesg`), then run the same command again"


class NotDurable(Failed):
    """A flush failed, so nothing was switched: the job was cancelled and the old chain is in use."""

    node: str
    reason: str
    sentence = "the storage did not make {node} durable: {reason}; nothing was switched, the old chain is in use"
    advice = "look at the storage's logs; once it is well, run the same command again"


class BitmapsNotCarried(Failed):
    """The dirty bitmaps could not be merged into the base's; the job was cancelled, nothing was switched."""

    base: str
    reason: str
    sentence = "the dirty bitmaps could not be carried over to {base}: {reason}; nothing was switched"
    advice = "the old chain is in use and right; `--force would-lose` merges without them"


class NotVerified(Failed):
    """What the base shows after the copy is not what the top shows; the job was cancelled, nothing was switched."""

    base: str
    top: str
    reason: str
    sentence = "{base} was compared with {top} before the switch: {reason}; nothing was switched"
    advice = "the old chain is in use and right; look at the storage of {base} before you try again"


class Damaged(Unknown):
    """
    What a pull has copied is not what it was copied from, and no guest has written there. The job was cancelled, and the old
    chain is in use, but whoever reads the overlay reads the copy.
    """

    overlay: str
    below: list[str]
    offset: int
    sentence = (
        "{overlay} was compared before the switch: from byte {offset} on it holds something else than the images that it was "
        "copied from; nothing was switched, but the guest reads the copy"
    )
    advice = "keep {below}, where it is right, and look at the storage of {overlay}, which has changed what was written to it"


class MaybeDamaged(Unknown):
    """
    What a pull has copied is not what it was copied from, and it could not be seen whether a guest has written there. The job
    was cancelled, and the old chain is in use, but whoever reads the overlay reads the copy.
    """

    overlay: str
    below: list[str]
    offset: int
    reason: str
    sentence = (
        "{overlay} was compared before the switch: from byte {offset} on it holds something else than the images that it was "
        "copied from, and it could not be seen whether a guest has written that ({reason}); nothing was switched, but the "
        "guest reads what {overlay} holds"
    )
    advice = (
        "if somebody has written there while the pull was at work, all is right, and `--force doubtful` goes on; if not, keep "
        "{below}, where it is right, and look at the storage of {overlay}"
    )


class NotAtRest(Failed):
    """The guest was paused to compare base with top, and somebody let it run, or wrote; the job was cancelled."""

    base: str
    top: str
    sentence = (
        "{base} could not be compared with {top}: the guest, which was paused for it, was let run by somebody else; "
        "nothing was switched, the old chain is in use"
    )
    advice = "run the same command again, and let nobody send `cont` until it has ended"


class MigrationBegan(Failed):
    """The VM is being migrated since the job was started, so nothing was switched: the job was cancelled."""

    target: str
    state: str
    sentence = (
        "{target} is being migrated since the merge began ({state}); nothing was switched, the old chain is in use"
    )
    advice = "wait for the migration's end, or send `migrate_cancel` to the monitor; then run the same command again"


class Displaced(Failed):
    """
    The name of an image that the merge writes to leads to it no more: it was renamed, removed or replaced while the job ran.
    So a merge would end in a file that nobody finds again. Facts as those of `Replaced`.
    """

    file: str
    found: str
    cure: str
    sentence = "{file} was displaced while the job ran ({found}); nothing was switched, the old chain is in use"
    advice = "{cure}"


class CutShort(Failed):
    """
    A raw image was cut off while the job ran: it has fewer bytes than QEMU believes, and the next start of the VM would have a
    smaller disk. The job was cancelled.
    """

    file: str
    size: int
    needed: int
    sentence = (
        "{file} has {size} bytes, where QEMU believes {needed}: it was cut off while the job ran; nothing was switched, the "
        "old chain is in use"
    )
    advice = (
        "what it alone held behind that is gone: `truncate -s {needed} {file}` gives it its length again, with zeros there "
        "unless you have a copy to put back (QEMU may read zeros there until it is started again); then run the same command "
        "again"
    )


class NotPaused(Failed):
    """Somebody else pauses the guest, or looks at it while it stands still, and does not end; the job was cancelled."""

    target: str
    reason: str
    sentence = "the guest was not paused: {reason}; nothing was switched, the old chain is in use"
    advice = "wait until it has done, or end it if it hangs; then run the same command again"


class RecordFailed(Failed):
    """What was about to be done could not be written down, so it was not done; the job was cancelled."""

    path: str
    reason: str
    sentence = "cannot write {path}: {reason}; nothing was switched, the old chain is in use"
    advice = "make room for a small file beside the active image, then run the same command again"


class NotProven(Unknown):
    """What a fresh look shows is not what the plan says."""

    target: str
    expected: str
    found: str
    sentence = "the outcome is not proven: expected {expected}, found {found}"


@contextlib.contextmanager
def unproven(target: str, expected: str) -> Iterator[None]:
    """What cannot be looked at once something was begun is not refused, as if nothing had been done: it is not proven."""
    try:
        yield
    except Untouched as error:
        raise NotProven(target=target, expected=expected, found=f"no way to look: {error}") from None


class NotUnderItsName(Unknown):
    """
    QEMU has switched, and the name of an image of the new chain leads to it no more: a start from that name fails, or shows
    other data, and an image without any name is lost with the QEMU that has it open. Facts as those of `Replaced`.
    """

    file: str
    found: str
    cure: str
    sentence = "the outcome is not proven: {file} is not the file that QEMU uses: {found}"
    advice = "{cure}"


class HeaderNotDurable(Unknown):
    """The merge is done, but the storage did not confirm the overlay's new header: after a power cut it may be old."""

    target: str
    overlay: str
    reason: str
    sentence = "merged, but the storage did not make the new header of {overlay} durable: {reason}"
    advice = (
        "keep the merged files, which the header may still name, or name again after a power cut; once the storage is well, "
        "run the same command again"
    )


class SessionLost(Unknown):
    """The monitor session ended while a command was under way. `image` is the active image of a QEMU that is gone."""

    target: str
    command: str
    reason: str
    image: str = ""
    sentence = "the session with {target} was lost during {command}: {reason}"
    advice = "its QEMU is gone: run `qmpmerge recover {image}` before the VM is started again"

    @property
    def hint(self) -> str:
        """As of any error; a QEMU that may be there still is asked."""
        return super().hint if self.image else Unknown.advice.format(target=shlex.quote(self.target))


class NoReply(Unknown):
    """No reply in time. The command may still run."""

    target: str
    command: str
    seconds: float
    sentence = "{target} did not answer {command} within {seconds:g} s"


class BadReply(Unknown):
    """
    QEMU answered with what it never says: a key is missing, a value has another type, or its parts do not go together. What
    the command did is not known, and what was to be learned from it neither.
    """

    target: str
    command: str
    came: str
    sentence = "{target} answered {command} with what QEMU never says: {came}"


class ThawUnproven(Unknown):
    """
    The guest may be frozen still: the agent confirmed no thaw, neither to us nor to the dead man's switch.

    Every try wrote the command to the channel, so an agent that was only slow still thaws the guest when it gets there.
    """

    agent: str
    reason: str
    sentence = "THE GUEST MAY STILL BE FROZEN: its agent at {agent} did not confirm the thaw: {reason}"
    advice = (
        'thaw it now: `echo \'{{"execute":"guest-fsfreeze-thaw"}}\' | socat -t5 - UNIX-CONNECT:{agent}`, '
        "or `fsfreeze --unfreeze MOUNTPOINT` in the guest"
    )


class FreezeUnproven(Unknown):
    """
    The guest runs again, but its filesystems were not frozen to the end of the block, or nobody can say.

    Somebody thawed them earlier: the dead man's switch after its limit, a command in the guest, or a Windows guest, where a
    freeze ends by itself after 10 s.
    """

    agent: str
    frozen: int
    held: int
    sentence = (
        "the guest behind {agent} was thawed too early: of {frozen} frozen filesystems, {held} were still frozen "
        "when the snapshot was taken"
    )
    advice = "the guest is thawed and the snapshot is there, but only crash-consistent; take another one"


class PauseUnproven(Unknown):
    """The guest was paused for the pivot, and neither we nor the dead man's switch saw it run again."""

    target: str
    reason: str
    sentence = "THE GUEST MAY STILL BE PAUSED: {target} did not confirm `cont`: {reason}"
    advice = "let it run: send `cont` to its monitor; then run `qmpmerge recover` on the folder of its images"


class ActiveUnknown(Unknown):
    """A merge of the chain is not finished, so nobody knows yet which image a VM must be started from."""

    path: str
    reason: str
    cure: str
    sentence = "which image a VM must be started from is not known for {path}: {reason}"
    advice = "{cure}; then ask again"


class CannotRecover(Unknown):
    """What is known to be right cannot be put right: nothing more was done, and it can be tried again."""

    file: str
    reason: str
    sentence = "cannot put {file} right: {reason}"
    advice = "fix the cause, then run the same command again: it goes on from there"


class Undecided(Unknown):
    """
    Nobody can tell which of two images holds the last writes: the evidence is shown, nothing was changed.

    `choices` are the words that `--use` takes: an image that is not there is none, and some evidence no word outweighs.
    """

    base: str
    top: str
    evidence: list[str]
    path: str
    choices: list[str]
    sentence = "{base} and {top} both may hold the last writes: {evidence}; nothing was changed"
    advice = (
        "look into both (read-only), then run `qmpmerge recover {path} --use base` to go on from {base}, "
        "or `--use top` to go on from {top}"
    )

    @property
    def hint(self) -> str:
        """As of any error; of what can be chosen."""
        if len(self.choices) > 1:
            return super().hint
        again = f"qmpmerge recover {shlex.quote(self.path)}"
        if not self.choices:
            return f"keep copies of all that is there, see to what the evidence names, then run `{again}` again"
        (choice,) = self.choices
        image = self.base if choice == "base" else self.top
        other = "the other is gone, or another file has its name"
        return f"look into {image} (read-only), then run `{again} --use {choice}` to go on from it; {other}"
