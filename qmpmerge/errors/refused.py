"""
Refusals: a check said no, and nothing was changed. Longer than other files: a catalogue, that is looked up and not read.
"""

import shlex

from qmpmerge.errors.base import Refused
from qmpmerge.errors.sizes import size


class VmState(Refused):
    """
    The VM waits for a migration, is being migrated or was, or its images are inactive for another reason: what is written
    now is lost, or kills QEMU. Snapshots and `job` are refused too.

    `state` is QEMU's RunState, or the migration's, or ``inactive`` for nodes that say so; `reason` says it in words.
    """

    target: str
    state: str
    reason: str
    instead: str
    sentence = "the disks of {target} must not be changed now ({state}): {reason}"
    advice = "{instead}; then try again"


class SeveralImages(Refused):
    """A disk that is several images at once (quorum), each of which may have layers of its own."""

    disk: str
    driver: str
    images: list[str]
    sentence = "{disk} is a {driver} of several images, of which each has a chain of its own: {images}"
    advice = "merge each with the VM off: `qmpmerge commit IMAGE`"


class ShorterLayer(Refused):
    """
    An image above the base is smaller than the base.

    Above the end of a short layer the guest reads zeros; after the merge it would read what the base holds there.
    QEMU does this without a word, from 5.2 to 11.1: test_merge pins it.
    """

    image: str
    size: int
    base: str
    base_size: int
    instead: str = "merge into an image above the short one"
    sentence = (
        "{image} is shorter than {base} ({size} < {base_size} bytes): the merge would uncover the base's stale data"
    )
    advice = "{instead}, or grow it first with `block_resize` or `qemu-img resize`"


class Busy(Refused):
    """
    A block job is on the disk already; QEMU takes one commit job a disk. Or, without a `job`, the process `holder` does with
    the QEMU what one may do at a time, and does not end.
    """

    disk: str
    target: str
    job: str = ""
    holder: str = ""
    verbs: list[str] | None = None
    sentence = "{disk} is busy: {who} is working on it"
    advice = "wait until it has ended{ways}"

    @property
    def hint(self) -> str:
        """Of a job what its state allows; a process is no job that could be followed."""
        return super().hint if self.job else f"wait until {self.holder} has done, or end it if it hangs; then try again"

    def _words(self) -> dict[str, object]:
        command = shlex.join(["qmpmerge", "job", self.target, self.job])
        verbs = self.verbs or ()
        ways = [f"`{command} {verb}` {what}" for verb, what in _WAYS.items() if verb in verbs]
        stays = ", which it does not by itself" if ways and not {"pivot", "finalize"}.isdisjoint(verbs) else ""
        who = " of ".join(filter(None, (self.job and f"job {self.job}", self.holder)))
        return {**super()._words(), "who": who, "ways": stays + "".join(f", or {way}" for way in ways)}


_WAYS = {
    "follow": "goes on with it",
    "resume": "lets it go on",
    "finalize": "has it take its last step",
    "cancel": "ends it",
    "dismiss": "takes it away",
}
"""What frees a disk, by the verb of `qmpmerge job`."""


class Locked(Refused):
    """Another qmpmerge works on the same base."""

    base: str
    lock: str
    sentence = "another qmpmerge is merging into {base}"
    advice = "wait for it; its lock is {lock}"


class Overtaken(Refused):
    """While others were waited for, another qmpmerge went on with what was begun on the chain, ended it, or began anew."""

    image: str
    sentence = "another qmpmerge was at work on the chain of {image}, which is not what it was when we looked at it"
    advice = "run the same command again: it looks afresh"


class Attached(Refused):
    """
    A layer that goes is also read, or the base kept from being written, by a device, an export or a filter of this QEMU,
    which starts no job that writes to such an image or takes it away.
    """

    file: str
    users: list[str]
    cure: str
    sentence = "{file} is also used directly, by {users} of this very QEMU, which merges nothing under their feet"
    advice = "{cure}; then try again, or merge a range that leaves {file} out"


class CannotLock(Refused):
    """
    What lies under the name of the lock is not ours to lock and to write to, or there is no room for it: two of us could
    meet on the base.
    """

    base: str
    lock: str
    reason: str
    sentence = "cannot lock {base}: {lock}: {reason}"
    advice = "make room, or where something lies there and no qmpmerge is at work on it, remove it (`rm -rf -- {lock}`)"


class Temporary(Refused):
    """A ``snapshot=on`` drive: the merge would write into the image that the user meant to protect."""

    disk: str
    file: str
    sentence = "{disk} is a snapshot=on drive, its active image {file} is a temporary file"
    advice = "nothing to merge: what the guest wrote there is meant to be thrown away"


class Replaced(Refused):
    """
    The name of an image does not lead to the file that QEMU has open: it was replaced, renamed or removed. QEMU would open
    the name again and use what is there. Of a `snapshot` too; where it is QEMU's own name that does not, see
    `not-reopenable`.

    `found` tells the files apart, `cure` has the commands that put it back.
    """

    file: str
    found: str
    cure: str
    sentence = "{file} is not the file that QEMU has open: {found}"
    advice = "{cure}"


class Disagrees(Refused):
    """The header on disk tells another chain than QEMU does."""

    image: str
    header: str
    graph: str
    sentence = "the header of {image} names {header} as its backing file, QEMU uses {graph}"
    advice = "fix the header first (`qemu-img rebase -u`, with the VM off), or merge a range that leaves {image} out"


class BackingString(Refused):
    """
    The name that the overlay's header would get does not fit there, or would not lead to the base from every folder it may
    be read from. `json:` and protocol names are kept to the letter.
    """

    overlay: str
    backing: str
    reason: str
    sentence = "the header of {overlay} cannot name {backing} as its backing file: {reason}"
    advice = "keep the chain in one folder with relative backing names, or give absolute ones (`qemu-img rebase -u`)"


class NotWritable(Refused):
    """
    QEMU, as the user it runs as, may not write to the base or the overlay (permissions, attributes, read-only mounts and
    nodes), or could not rewrite the overlay's header with the very string it has.

    The latter at the end of the merge would crash QEMU (5.2 to 11.1: test_merge pins it), so it is tried first.
    """

    file: str
    reason: str
    sentence = "QEMU cannot write to {file}: {reason}"
    advice = "make {file} writable for QEMU (permissions, `chattr -i`, mount options, free space), then try again"

    @property
    def hint(self) -> str:
        """As of any error; of a node that was opened with `read-only=on`, which only QEMU tells, how it is opened instead."""
        if "is read-only" not in self.reason:
            return super().hint
        return (
            "start the VM with `auto-read-only=on` in place of `read-only=on` for the `file` node of this image, which QEMU "
            "then opens for writing when needed; or merge with the VM off"
        )


class NotReopenable(Refused):
    """
    QEMU opens an image again, by the name that it has for it, to write to it. From where QEMU is now, the name leads nowhere,
    or to another file, which would be written. Of a `snapshot` too: nothing could be merged into that image while the VM runs.

    So it is with relative names after ``-daemonize``, which moves to / (7.2 to 11.1: test_sight pins it).
    """

    file: str
    known_as: str
    leads: str
    sentence = (
        "QEMU cannot open {file} for writing: it knows it as {known_as}, which leads {leads} from where QEMU is now"
    )
    advice = "start the VM with absolute file names, or merge with the VM off"


class NotSeen(Refused):
    """
    It cannot be told of an image where it lies: QEMU is in another mount namespace, was handed descriptors, or is another
    user's and no lock tells. Or a folder of the chain may not be listed, or an image in it, or a note about one elsewhere,
    does not tell what it is built on.
    """

    unseen: list[str]
    reason: str
    cure: str
    sentence = "cannot look at {unseen}: {reason}"
    advice = "{cure}"


class FlushUnavailable(Refused):
    """
    QEMU cannot be asked for a flush whose error we would see. It is not asked where QEMU 7.2 would abort (a disk that is
    exported in an iothread).

    Without one a failing disk would be reported as a merge that went well (test_merge pins it).
    """

    reason: str
    cure: str
    sentence = "QEMU cannot be asked to make the base durable: {reason}"
    advice = "{cure}, then try again"


class StreamConcluded(Refused):
    """
    A stream job of somebody else has ended and was not dismissed: QEMU 7.2 to 10.0 crash when asked for their nodes then.
    Every command that looks at disks is refused.
    """

    job: str
    target: str
    sentence = "stream job {job} has ended but was not dismissed; QEMU may crash if asked about its disks now"
    advice = "run `qmpmerge job {target} {job} dismiss` first"


class InUse(Refused):
    """
    Another process has the base, a merged image or the overlay open; of a pull the image that is pulled into; offline also
    the active image, or any that the process may write to. It is named with pid, VM and monitor. Or the kernel has: a loop
    device, a mounted filesystem, swap, device-mapper, RAID. Of a `snapshot` too.
    """

    file: str
    holders: list[str]
    command: str
    sentence = "{file} is in use by {holders}"
    advice = "{command}"


class Dependents(Refused):
    """
    Another image is built on the base or on a merged one: in the chain's folders, below those of `--search`, or open in any
    QEMU of this host. The merge would change what it shows, or break it.
    """

    images: list[str]
    dependents: list[str]
    away: list[str]
    """Commands that put those out of reach which were merged away and have kept their names."""
    pull: str
    """The command that shortens the chain and changes none of them."""
    below: str = ""
    """The command that merges the same images below the one that is built on the newest of them."""
    sentence = "other images are built on what the merge writes to or takes away ({images}): {dependents}"
    advice = (
        "`{pull}` shortens the chain too, and leaves them as they are. This would ruin them: merge them first, or give them a "
        "copy; if one is the newest image of this very chain, name that as TARGET; one that an earlier merge has stashed goes "
        "with `qmpmerge clean FILE`. `--force dependents` merges all the same"
    )

    @property
    def hint(self) -> str:
        """As of any error; of what nobody needs any more, how it is put out of the way."""
        if self.below:
            return f"`{self.below}` merges them below the one that is built on them, which stays; or {super().hint}"
        if not self.away:
            return super().hint
        merged = f"once nobody uses what was merged away already, put it out of reach: {'; '.join(self.away)}"
        is_all = len(self.away) == len(self.dependents)
        return (
            f"{merged}; or `{self.pull}`, which needs none of that"
            if is_all
            else f"{merged}; of the others: {super().hint}"
        )


class SharedBase(Refused):
    """
    The base lies outside the active image's folder, as golden images do, and neither `--base` names it nor a `--search`
    went through its folder.
    """

    base: str
    active: str
    command: str
    pull: str
    """The command that shortens the chain and leaves the base as it is."""
    sentence = "{base} lies outside the folder of {active}: others may be built on it, and the merge would change it"
    advice = "`{pull}` shortens the chain and leaves it as it is; if it is to be changed, say so with {command}"


class ForeignName(Refused):
    """
    Offline, a header names something that the user has not named: a device, a URL, `json:`, a file in another folder
    (`file:/PATH` is the path).

    Following it could connect to strangers or hang, and a merge could overwrite any file that we may write.
    """

    image: str
    backing: str
    reason: str
    sentence = "{image} names {backing}, which is not followed: {reason}"
    advice = "if you know the image, allow it with `--allow FOLDER` or `--allow FILE`"


class NoFormat(Refused):
    """
    The base's format is not recorded in the header above it, and a raw image must not be probed: its first bytes are the
    guest's.
    """

    image: str
    backing: str
    instead: str = ""
    sentence = "{image} does not record the format of its backing file {backing}"
    advice = "with the VM off record it with `qemu-img rebase -u -b {backing} -F raw {image}` (or -F qcow2){instead}"


class Disguised(Refused):
    """
    Offline, a raw image or a device begins like qcow2, and no `--format` says that it is: a raw image's first bytes belong
    to its guest, which can write a qcow2 header there and name any file of ours.
    """

    image: str
    sentence = "{image} is called raw, or is a device, but begins like qcow2: its guest may have written that"
    advice = "if it really is a qcow2 image, say so with `--format qcow2`"


class BackingLoop(Refused):
    """The chain comes back to an image that it has passed."""

    image: str
    backing: str
    sentence = "the chain is a loop: {image} names {backing}, which stands above it"
    advice = "one of the headers is wrong; `qemu-img info` shows each, `qemu-img rebase -u` fixes one"


class TooDeep(Refused):
    """More images than QEMU can read through."""

    image: str
    limit: int
    sentence = "the chain below {image} has more than {limit} images, QEMU may crash reading through it"
    advice = "merge parts of it first, naming an image further down"


class UnsupportedFormat(Refused):
    """A chain on disk with an image of a format that we do not open offline."""

    image: str
    format: str
    active: str
    active_format: str
    instead: str = ""
    sentence = "{image} is {format}, or begins like it; merging offline is for qcow2, raw and luks images"
    advice = (
        "merge while a VM has it open; or, if you know the image, copy the whole chain into a new one: `qemu-img convert -f "
        "{active_format} -O qcow2 {active} {active}.qcow2`{instead}"
    )


class NoSpace(Refused):
    """
    The base would grow by more than its filesystem has left; of a pull the active image, by more than that less a reserve
    for the guest.

    QEMU pauses the job when it is full, but so do all others who write there: `free` is what QEMU may still use.
    """

    base: str
    growth: int
    free: int
    reserve: int = 0
    """Bytes that must be left for what the guest writes to the same image."""
    sentence = "{base} would grow by {growth}, and its filesystem has {free} left for QEMU{kept}"
    advice = "free space there, or merge fewer images at a time; `--force no-space` lets the job wait for space when it is full"

    def _words(self) -> dict[str, object]:
        known = {name: size(count) for name, count in (("growth", self.growth), ("free", self.free))}
        kept = f", where {size(self.reserve)} are to be left for what the guest writes" if self.reserve else ""
        return {**super()._words(), **known, "kept": kept}


class DeviceTooSmall(Refused):
    """
    The base is a device, or a part of a file, and does not grow; QEMU says no better than `Invalid argument`, and only once
    it has begun.
    """

    base: str
    size: int
    needed: int
    sentence = "{base} is a device or a part of a file, has {size} bytes and cannot grow to {needed}"
    advice = "enlarge it first, or merge into an image file"


class CannotCompare(Refused):
    """What is to be compared is encrypted: that is done by another process, which is given no passphrase."""

    images: list[str]
    sentence = "what is merged cannot be compared, as is asked for: {images} is encrypted"
    advice = "leave `--verify` out, and `--merged-files delete`, which needs it"


class CannotGrow(Refused):
    """
    The base is qcow2 of `compat=0.10`, smaller than the top and than what it is built on, which would show behind its old
    end: it has no way to note zeros there. QEMU says no better than `Operation not supported`, and only once it has begun.
    """

    base: str
    size: int
    needed: int
    pull: str
    """The command that shortens the chain and leaves the base as it is."""
    cure: str
    """The command that gives the base a way to note zeros."""
    sentence = "{base} is qcow2 of compat=0.10 with a backing file, has {size} bytes and cannot grow to {needed}"
    advice = "with the VM off `{cure}` makes it one that can; or `{pull}` shortens the chain and leaves it as it is"


class WouldLose(Refused):
    """
    Merged images have internal snapshots, or dirty bitmaps that cannot be carried over to the base (a raw one has no room
    for them); or the image that is pulled into has internal snapshots, which need what leaves the chain; or what is
    encrypted would be written to an image that is not.
    """

    lost: list[str]
    sentence = "it would lose {lost}"
    advice = (
        "`--force would-lose` goes on without: internal snapshots can be copied out before, with `qemu-img convert -l NAME`, "
        "after a lost dirty bitmap the next backup must be a full one, and what was encrypted lies on the disk in clear"
    )


class KnownBad(Refused):
    """
    This QEMU crashes on this, measured. QEMU 7.2 would move an emulated NVMe disk, or one under a copy-before-write filter,
    or would pull into an image with `extended_l2`; QEMU 8 and later would read through more than 800 images; the base was
    handed to QEMU as a descriptor, with locks; or an image below the active one is marked as dirty (`lazy_refcounts`, after
    a crash).
    """

    reason: str
    instead: str
    sentence = "this QEMU may crash: {reason}"
    advice = "{instead}; `--force known-bad` goes on if you know that yours does not"


class Doubtful(Refused):
    """
    An earlier pull into an image that is merged, or written to, ended with `damaged` or `maybe-damaged`: what it holds may
    be wrong, and what is right may be in those below it alone, which a merge would overwrite, or take out of the chain.
    """

    file: str
    sentence = "what {file} holds may be wrong: an earlier pull found that it differs from what was copied into it"
    advice = (
        "keep the images below it, which have what is right, and put {file} right first; where you know that it is right, as "
        "where a guest has written what differs, `--force doubtful` goes on"
    )


class Suspect(Refused):
    """
    An earlier merge into this base failed on its storage, and now the guest writes where both would be compared.

    QEMU may believe that base holds what the storage has lost (5.2 to 11.1), so it is compared before it is used; a base
    that the guest would move onto can be compared only while the guest stands still.
    """

    base: str
    reason: str
    sentence = "{base} must be compared first: an earlier merge into it failed ({reason}), and the guest writes"
    advice = (
        "put an overlay on top (`qmpmerge snapshot`) and merge with `--top` what is below it, which is compared while the "
        "guest runs; or pause the guest for the merge"
    )


class NotAnOverlay(Refused):
    """
    What `snapshot --reuse` was given is no overlay of the disk's active image: it is no qcow2 image; its header names
    another backing file than the image in use, or another format for it; it is smaller than the disk, encrypted, damaged,
    has a data file or internal snapshots, is in a chain already, or another image is built on it.
    """

    file: str
    disk: str
    reason: str
    command: str
    sentence = "{file} cannot be the overlay of {disk}: {reason}"
    advice = (
        "name a file that is not there and leave out `--reuse`; an overlay is made by `{command}`, which overwrites what is on "
        "a device"
    )


class OverlayNotEmpty(Refused):
    """What `snapshot --reuse` was given holds data of its own, which the guest would see in the place of what it wrote."""

    file: str
    disk: str
    held: int
    sentence = "{file} holds {held} bytes of its own, which the guest would see in the place of what {disk} has there"
    advice = "take an overlay to which nothing was written, or name a file that is not there and leave out `--reuse`"


class LibvirtManaged(Refused):
    """The QEMU belongs to libvirt, which keeps its own idea of the chain."""

    vm: str
    sentence = "{vm} is managed by libvirt, which must know of every change to its disks"
    advice = "use `virsh blockcommit`; `--force libvirt` goes on if you know better"


class Unfinished(Refused):
    """
    A merge of the image was begun and not finished, and what remains is not for a merge to decide, or the image's name is
    taken away for as long as nobody has.
    """

    image: str
    found: str
    path: str
    sentence = "a merge of {image} was not finished: {found}"
    advice = "run `qmpmerge recover {path}`"


class RecordNotBelieved(Refused):
    """
    What lies beside an image under the name of a merge's record cannot be read, or could have been written by anybody: so
    what an earlier merge has done is not known.
    """

    image: str
    path: str
    reason: str
    cure: str
    sentence = "whether a merge of {image} was left unfinished is not known: {path} is not believed ({reason})"
    advice = "{cure}"


class ForeignFile(Refused):
    """
    To end an earlier merge a file would have to be renamed, or its header written, that only the merge's record names: it
    lies outside the record's folder, and QEMU does not show it in the chain. A record is a file that somebody may have put
    there. Of `recover` too, which takes `--allow`.
    """

    path: str
    files: list[str]
    command: str
    sentence = "only the record {path} says that {files} is of that merge, outside of its own folder"
    advice = "if you know that merge, `{command}`; if not, it was none: `mv -nT -- {path} {path}.not-believed`"


class CannotRecord(Refused):
    """The record of what is about to be done could not be written whole, so it was not begun."""

    path: str
    reason: str
    sentence = "cannot write {path}: {reason}"
    advice = "make room for a small file there, or move away what has its name, then run the same command again"


class Stashed(Refused):
    """TARGET is the old name of an image that a merge has stashed: no misspelt VM."""

    image: str
    now: str
    sentence = "{image} was merged away, and its file is {now} now"
    advice = (
        "name the image that the VM is started from since then; `qmpmerge recover {image}` says what it was built on"
    )


class NoActive(Refused):
    """No image is known from which a VM could be started without showing older data, or failing."""

    path: str
    reason: str
    cure: str
    sentence = "which image a VM must be started from is not known for {path}: {reason}"
    advice = "{cure}"


class SeveralActive(Refused):
    """More than one image is built on this one, or lies in this folder, on which nothing else is built."""

    path: str
    images: list[str]
    are_disks: bool
    """Whether no two of them have an image below in common."""
    sentence = "more than one image of {path} could be what a VM must be started from: {images}"
    advice = "{which}, as in `qmpmerge active {first}`; where one is a leftover, `qmpmerge doctor {first}` tells more"

    def _words(self) -> dict[str, object]:
        which = "these are separate disks: ask for each" if self.are_disks else "name the one that is meant"
        return {**super()._words(), "which": which, "first": self.images[0] if self.images else "IMAGE"}
