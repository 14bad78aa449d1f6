"""
The `qmpmerge` command with a killer in it: ``python kills.py NOTES VICTIM MOMENT [qmpmerge's arguments]``.

Every QMP command that is sent and every reply to one is a moment, and so is every report of progress on the way, each
with its number: ``-> job-finalize #1`` is before the first job-finalize leaves us, ``<- job-finalize #1`` is when we have
its reply, ``progress #2`` is at the second report. What is done with names and with the record are moments too: ``=> rename
#1`` is before the first rename, ``<= rename #1`` after it. ``-> job-finalize #1 +0.5`` is half a millisecond after it. At
MOMENT the victim, which is ``tool``, ``daemon`` or ``both``, dies of SIGKILL; the daemon is the private one, or the QEMU
whose pid is in QMPMERGE_VICTIM. Moments, and the daemon's pid, are noted in the file NOTES as they come; a MOMENT that does
not come is a run without a kill.

It is the real command in all else: what ``-v`` shows is what the killer hangs on.
"""
