"""Errors of what was asked for: no such disk, layer or job, options that conflict."""

import shlex

from qmpmerge.errors.base import Refused
from qmpmerge.errors.nearest import nearest, question


class NoSuchDisk(Refused):
    """DISK names nothing that the target has."""

    disk: str
    target: str
    known: list[str]
    sentence = "no disk {disk} on {target}"
    advice = "disks there: {known}"

    @property
    def hint(self) -> str:
        """What may have been meant, and the disks."""
        return question(nearest(self.disk, self.known)) + super().hint


class DiskNeeded(Refused):
    """DISK was left out and several disks have a backing chain, or none has. `command` is a line that names one."""

    target: str
    known: list[str]
    command: str = ""
    sentence = "{target} has more than one disk that this could mean: {known}"
    advice = "name one of them"

    @property
    def hint(self) -> str:
        """With the line, where one is known."""
        return super().hint + (f", as in `{self.command}`" if self.command else "")


class NoDisk(Refused):
    """The target has no disk at all."""

    target: str
    sentence = "{target} has no disk with an image"
    advice = "see `qmpmerge disks {target}`"


class NoSuchLayer(Refused):
    """--base or --top names no image of the chain, which has `count`; `known` are the nearest of them, base first."""

    layer: str
    disk: str
    count: int
    known: list[str]
    nearest: str | None = None
    sentence = "no image {layer} in the chain of {disk}"
    advice = "the chain, base first: {known}"

    @property
    def hint(self) -> str:
        """What may have been meant, and the layers."""
        some = f"{len(self.known)} of its {self.count} images, base first: {', '.join(self.known)}"
        return question(self.nearest) + (some if self.count > len(self.known) else super().hint)


class AmbiguousLayer(Refused):
    """
    --base or --top names several images of the chain, or one of it and another file that lies here. `known` are the first of
    the `count`, `words` are such as mean one each.
    """

    layer: str
    disk: str
    count: int
    known: list[str]
    words: list[str]
    sentence = "{layer} can mean {count} images of {disk}: {known}"
    advice = "name the one that is meant: {choice}"

    def _words(self) -> dict[str, object]:
        return {**super()._words(), "choice": " or ".join(f"`{shlex.quote(word)}`" for word in self.words)}


class BaseAboveTop(Refused):
    """The base lies above the top, of a merge as of a pull (`pulls`)."""

    base: str
    top: str
    pulls: bool = False
    sentence = "the base {base} lies above the top {top}"
    advice = "swap --base and --top"

    @property
    def hint(self) -> str:
        """Of a pull the base itself is not copied, and what is meant by it may be."""
        below = "; what is pulled lies between them: to pull the base too name the image below it, or none"
        return super().hint + (below if self.pulls else "")


class BaseIsTop(Refused):
    """Base and top are one image, the lowest of the chain or not: nothing lies between them."""

    base: str
    is_lowest: bool = False
    pulls: bool = False
    sentence = "base and top are both {base}, so there is nothing to merge"
    advice = "name a base further down, or leave --base out to merge into the lowest image"

    @property
    def hint(self) -> str:
        """There is nothing below the lowest image; a pull without a base leaves none."""
        if self.is_lowest:
            return "name a --top further up: this is the lowest image"
        return (
            "name a base further down, or leave --base out to pull all that lies below" if self.pulls else super().hint
        )


class OptionsConflict(Refused):
    """Two options of which only one can be meant."""

    options: list[str]
    sentence = "{options} cannot be used together"
    advice = "leave one of them out"


class NotAgreed(Refused):
    """
    The merge that would be begun is none of those to which the user has agreed (`commit`): the chain, or what would become
    of its files, has changed since the plan was made. `chain` is what it is now.
    """

    disk: str
    chain: str
    sentence = "{disk}: what would be merged now is not what was agreed to: the chain is {chain}"
    advice = "look at the plan again (`--dry-run`)"


class ActiveOnly(Refused):
    """An ending of active merges, asked of one whose top is below the active image: that one cannot be left half done."""

    option: str
    top: str
    active: str
    instead: str = "without `--top`"
    sentence = "{option} is for a merge of the active image {active}, and this one ends at {top}"
    advice = "leave it out to have {top} merged for good, or have the active image merged too ({instead})"


class LiveOnly(Refused):
    """An option about a job that is left, or a guest that writes, on images that no VM uses."""

    option: str
    instead: str = ""
    sentence = "{option} is for a running VM: offline no guest writes, and the job ends with the command"
    advice = "leave it out{instead}"


class NeedsSecret(Refused):
    """An encrypted image without its passphrase."""

    image: str
    sentence = "{image} is encrypted"
    advice = "give its passphrase with `--secret FILE`"


class SecretUnreadable(Refused):
    """The file with the passphrase cannot be read."""

    file: str
    reason: str
    sentence = "cannot read the passphrase from {file}: {reason}"
    advice = "the file holds the passphrase as text; a line end at its end does not count"


class QemuRefused(Refused):
    """
    QEMU answered a command with an error. Whoever sent the command mostly knows what that means, and says it instead; any
    command can fail, though, and where nobody expected it this is what it is. Raised before anything was begun, or of what
    changes nothing when it fails.
    """

    command: str
    reason: str
    sentence = "QEMU refused {command}: {reason}"
    advice = "nothing was changed; `-v` shows the conversation"

    @property
    def is_unheard_of(self) -> bool:
        """Whether there is no such command here: a storage daemon has no guest, and none of the commands about one."""
        return self.reason.endswith("has not been found")


class FileExists(Refused):
    """
    An overlay's file exists already; QEMU itself would overwrite it. `option` is what takes it as it is, where it is an empty
    overlay of the disk.
    """

    file: str
    option: str = ""
    sentence = "{file} exists already"
    advice = (
        "choose another name; where a VM uses the file leave it in its place, and merge first: `qmpmerge doctor {file}` says "
        "who has it open"
    )

    @property
    def hint(self) -> str:
        """As of any error, after the option."""
        first = f"it is an empty overlay of this disk, which `{self.option}` takes as it is; or " if self.option else ""
        return first + super().hint


class CannotCreate(Refused):
    """An overlay's file cannot be created."""

    file: str
    reason: str
    sentence = "cannot create {file}: {reason}"
    advice = "the folder must exist and be writable by you and by QEMU"


class NoAgent(Refused):
    """`--quiesce`, and QEMU does not tell on which socket the guest agent can be asked."""

    target: str
    reason: str
    sentence = "no guest agent of {target} can be reached: {reason}"
    advice = (
        "name its socket with `--agent SOCKET`, or leave out --quiesce: the snapshot is crash-consistent then; a VM has one by "
        "a virtserialport of the name org.qemu.guest_agent.0 on a `-chardev socket,server=on`"
    )


class AgentFailed(Refused):
    """The guest agent did not freeze the filesystems; no snapshot was taken."""

    agent: str
    reason: str
    sentence = "the guest agent at {agent} did not freeze the guest: {reason}"
    advice = "is qemu-guest-agent running in the guest? Without --quiesce the snapshot is crash-consistent"


class RecordingUnwritable(Refused):
    """The file that is to get the recording cannot be written, or is something else."""

    file: str
    reason: str
    sentence = "cannot record into {file}: {reason}"
    advice = "name a file that is not there yet, or a recording of your own, which is added to"


class NothingThere(Refused):
    """`recover` finds neither the path nor anything that a merge has left of it."""

    path: str
    sentence = "nothing is at {path}, and no merge has left anything of it"
    advice = "name an image or a folder: the image that the VM is started from (`qmpmerge disks VM` shows it), or where it lies"


class CannotList(Refused):
    """A folder that was named may not be looked at."""

    folder: str
    reason: str
    sentence = "cannot list {folder}: {reason}"
    advice = "run the same command as somebody who may, as root does"


class NoSuchStash(Refused):
    """`clean` removes what a merge has stashed, and nothing else."""

    path: str
    sentence = "{path} is no file that a merge has stashed"
    advice = "name a folder, or a file called NAME.merged"


class JobVerb(Refused):
    """The verb is not legal in the job's state."""

    job: str
    verb: str
    status: str
    verbs: list[str]
    sentence = "job {job} is {status} and cannot {verb} now"
    advice = "possible now: {verbs}"


class NoSuchJob(Refused):
    """No job of this name, or none on the disk of this name."""

    job: str
    target: str
    known: list[str]
    is_disk: bool = False
    sentence = "no job {job} on {target}"
    advice = "jobs there: {known}"

    @property
    def hint(self) -> str:
        """What may have been meant, and the jobs."""
        return question(nearest(self.job, self.known)) + super().hint

    def __str__(self) -> str:
        return f"no job on disk {self.job} of {self.target}" if self.is_disk else super().__str__()


class ToolMissing(Refused):
    """A program of QEMU's that we need is not installed."""

    program: str
    package: str
    sentence = "{program} is not installed"
    advice = "install it, on Debian and Ubuntu with `apt-get install {package}`"


class TooFewFiles(Refused):
    """The limit of open files (RLIMIT_NOFILE) is so low that the work could fail in the middle."""

    limit: int
    needed: int
    sentence = "{limit} open files at once are too few, {needed} may be needed"
    advice = (
        "raise the hard limit: in the shell of root with `ulimit -n {needed}`, of a service with LimitNOFILE=, of a user in "
        "/etc/security/limits.conf"
    )


class RecordingUnreadable(Refused):
    """The file is no recording, or none that this version reads."""

    file: str
    reason: str
    sentence = "cannot read the recording {file}: {reason}"
    advice = "name a file that `--record` has written"


class SeveralQemus(Refused):
    """More than one QEMU was spoken to in a recording, or none of the name that was given."""

    file: str
    known: list[str]
    sentence = "which QEMU of the recording {file} is to be replayed is not clear"
    advice = "name one with `--qemu NAME`: {known}"


class CannotListen(Refused):
    """A socket cannot be made where `replay` is to listen."""

    path: str
    reason: str
    sentence = "cannot listen at {path}: {reason}"
    advice = "name a file that is not there yet, in a folder that you may write to"


class ImageUnreadable(Refused):
    """qemu-img could not read or make an image."""

    file: str
    reason: str
    sentence = "qemu-img cannot use {file}: {reason}"
    advice = "does the file exist, and may you read it?"
