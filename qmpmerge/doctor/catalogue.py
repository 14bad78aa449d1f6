"""
What each finding of the doctor means, and what is done about it; docs/errors.md is made from it, and a test knows where a
finding is missing.
"""

from qmpmerge.doctor.findings import Severity

MEANINGS: dict[str, tuple[tuple[Severity, ...], str, str]] = {
    # name: how bad, what it means, what fixes it
    "started-stale": (
        ("harm",),
        "the VM was started from older data: another image is built on what it writes to, or it was merged away",
        "by hand: shut the VM down, keep copies of both, start it from the image that holds what is needed",
    ),
    "unsettled": (
        ("harm", "care", "note"),
        "a merge was left or interrupted, or the record of one is not believed",
        "`qmpmerge recover`; of a record that is not believed what the finding says",
    ),
    "disagrees": (
        ("harm",),
        "the header of an image names another one than QEMU uses: the next start shows another disk",
        "`qemu-img rebase -u` with the VM off",
    ),
    "replaced": (
        ("harm",),
        "another file is at a path than the one that QEMU has open",
        "by hand: put the old file back",
    ),
    "doubtful": (
        ("harm",),
        "a pull found that an image holds something else than was copied into it (`damaged`, `maybe-damaged`)",
        "by hand: keep what lies below it, and put it right",
    ),
    "unreadable": (("harm",), "the header of an image cannot be read, and the next start needs it", "by hand"),
    "image-unreadable": (("harm",), "QEMU cannot open an image: a VM on this chain does not start", "by hand"),
    "backing-loop": (
        ("harm",),
        "the chain comes back to an image that it has passed",
        "`qemu-img rebase -u` of one header",
    ),
    "too-deep": (
        ("harm",),
        "more images than QEMU can read through",
        "merge parts of it, naming an image further down",
    ),
    "corrupt": (
        ("harm",),
        "QEMU has marked an image as corrupt",
        "`qemu-img check -r all`, once what it holds is saved",
    ),
    "guest-io-error": (("harm",), "QEMU has stopped the guest at an I/O error", "see to the storage, then `cont`"),
    "throttle-left": (
        ("harm",),
        "a killed qmpmerge has left its limit on the guest's writes",
        "`block_set_io_throttle`",
    ),
    "stream-concluded": (
        ("harm",),
        "a stream job has ended and was not dismissed: QEMU 7.2 to 10.0 crash when asked for their nodes",
        "`qmpmerge job TARGET ID dismiss`",
    ),
    "job-pending": (
        ("harm", "care"),
        "a job has copied all and waits to be finalized; of an active one all I/O of the guest stands still",
        "`qmpmerge job TARGET ID follow`, or `job-finalize` of a job that is none of ours",
    ),
    "job-paused": (("care",), "a job is paused and comes to no end", "`qmpmerge job TARGET ID resume`"),
    "job-standby": (("care",), "a job is ready, and paused", "`qmpmerge job TARGET ID resume`"),
    "job-ready": (
        ("care",),
        "a job waits for somebody to end it",
        "`qmpmerge job TARGET ID pivot`, or `keep`, or `cancel`",
    ),
    "job-no-space": (("care",), "a job ran out of space", "make room; `qmpmerge job TARGET ID follow`"),
    "job-concluded": (
        ("note", "care"),
        "a job has ended, or failed, and nobody has read how",
        "`qmpmerge job TARGET ID dismiss`",
    ),
    "deep-chain": (
        ("harm", "care"),
        "the chain has 300 images or more, each of which costs time; from some 870 on QEMU 10 and 11 crash",
        "`qmpmerge commit`, of a part at a time",
    ),
    "not-looked-at": (
        ("care",),
        "something could not be looked at, or is on another filesystem: what is wrong there is not known",
        "look as a user who may, or name it as TARGET",
    ),
    "stale-image": (
        ("care",),
        "an image was merged and has kept its name: it opens without a word and shows older data",
        "`mv` into a folder `stale`, once nobody has it open",
    ),
    "not-active": (
        ("care",),
        "another image is built on the one that was named",
        "start the VM from what `qmpmerge active` says",
    ),
    "other-overlay": (
        ("care",),
        "an image is built on the chain and not in it: a merge would ruin it",
        "by hand: nothing proves it a leftover",
    ),
    "empty-overlay": (("care",), "an overlay that holds nothing, left by a snapshot that was not carried out", "`rm`"),
    "dependent": (("care",), "another process has an image open that is built on the chain", "by hand"),
    "used-below": (("care",), "a VM has an image below this one open, and this one not", "by hand"),
    "shared-image": (
        ("care", "note"),
        "more than one image is built on it; a note where they lie in another folder, as with golden images",
        "by hand: put a leftover out of reach",
    ),
    "odd-note": (
        ("care",),
        "a note about an overlay in another folder is not right: `active` tells no image",
        "what the finding says",
    ),
    "no-active": (("care",), "`qmpmerge active` tells no image to start a VM from", "what the finding says"),
    "several-active": (
        ("care",),
        "`qmpmerge active` finds several images to start a VM from",
        "name the one that is meant",
    ),
    "active-unknown": (
        ("care",),
        "a merge is not finished, so `qmpmerge active` tells no image",
        "what the finding says",
    ),
    "no-format": (
        ("care",),
        "a header does not record the format of its backing file: a raw one could lead QEMU to any file",
        "`qemu-img rebase -u -F FORMAT` with the VM off",
    ),
    "part-of-file": (
        ("care",),
        "QEMU uses a part of a file, and the header above names the whole",
        "`qemu-img rebase -u` with the VM off",
    ),
    "not-seen": (("care",), "an image of the chain cannot be looked at", "a merge is refused, and says what to do"),
    "disguised": (
        ("care",),
        "a raw image begins like qcow2: its guest may have written that",
        "always name `format=raw`",
    ),
    "foreign-name": (
        ("care",),
        "a header names something elsewhere, which is not followed",
        "`--allow`, if you know the image",
    ),
    "filter-left": (
        ("care",),
        "a filter of a job is on a disk on which no job works",
        "whoever inserted it takes it out",
    ),
    "unused-node": (("care", "note"), "a node that nobody uses keeps its files open, or locked", "`blockdev-del`"),
    "bitmap-inconsistent": (
        ("care",),
        "a dirty bitmap was in use when QEMU was killed",
        "`block-dirty-bitmap-remove`, or `qemu-img bitmap --remove` with the VM off",
    ),
    "guest-paused": (("care",), "the guest is paused, by whomever", "`cont`"),
    "in-use": (("note",), "a process, or the kernel, has an image open", "`qmpmerge doctor` of that VM"),
    "launch-path": (
        ("care", "note"),
        "the VM's command line names an image that is not the active one any more; care where `qmpmerge active` refuses",
        "let the launch script ask `qmpmerge active`",
    ),
    "job-running": (
        ("note",),
        "a job that a qmpmerge has started is at work, and nobody follows it (`--detach`, `--timeout`)",
        "`qmpmerge job TARGET ID follow`",
    ),
    "unfinished": (
        ("note",),
        "a merge was left, or a pull taken back; the next one into the same image heeds that",
        "nothing to do",
    ),
    "old-lock": (("note",), "the lock of a merge that was killed; it keeps nobody out", "`rm`"),
    "stashed": (("note",), "an image that a merge or a pull put aside takes up room", "`qmpmerge clean`"),
    "out-of-reach": (("note",), "images that were put out of reach, in a folder `stale`, take up room", "by hand"),
    "unsupported-format": (("note",), "an image of a format that is not merged offline", "`qemu-img convert`"),
}
"""By their names, roughly the worst first."""
