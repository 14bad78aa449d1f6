"""The states that an operation on a chain passes through, and which may follow which."""

import enum


class State(enum.Enum):
    """Where an operation stands. Those of `RECORDED` are written down before anything is done that only they explain."""

    PLANNED = "planned"
    """Nothing was sent. The checks have passed or will be asked; a refusal leaves everything as it was."""

    COPYING = "copying"
    """
    The job was asked for, and whether QEMU has it is for QEMU to say. The old chain is right, whatever dies; but for an active
    merge that was left ready, which anybody with the monitor can have told to move the guest since.
    """

    SAFE = "safe"
    """
    What was copied is durable, compared where that was called for, and the bitmaps are carried over. The old chain is
    right. This is the last state from which everything can be taken back, and in it a merge is held. It is not written down:
    after a crash, and for who goes on with what was held, it counts as COPYING.
    """

    SWITCHING = "switching"
    """
    Written down before it is begun: from now on either chain may be the one in use, and only the evidence decides. Of an
    intermediate merge the overlay's header may be rewritten; of an active one base and top are equal, top's name may be
    taken away, and then the device may move.
    """

    SWITCHED = "switched"
    """Seen in QEMU's graph: the new chain is right. The header may not be durable yet."""

    PROVED = "proved"
    """Graph and headers show the new chain, durably: only the files of the merged images remain to be dealt with."""

    DONE = "done"
    """Nothing remains; the record is gone."""

    UNDONE = "undone"
    """The job was taken back, and the old chain was seen to be in use; the record is gone."""

    KEPT = "kept"
    """The overlay was kept: base holds all data of that moment, the old chain is in use; the record is gone."""

    LEFT = "left"
    """We stopped waiting. The job goes on in QEMU, and the record waits for whoever comes next."""


NEXT: dict[State, frozenset[State]] = {
    State.PLANNED: frozenset({State.COPYING}),
    State.COPYING: frozenset({State.SAFE, State.SWITCHED, State.UNDONE, State.KEPT, State.LEFT}),
    State.SAFE: frozenset({State.SWITCHING, State.SWITCHED, State.UNDONE, State.KEPT, State.LEFT}),
    State.SWITCHING: frozenset({State.SWITCHED, State.UNDONE, State.LEFT}),
    State.SWITCHED: frozenset({State.PROVED}),
    State.PROVED: frozenset({State.DONE}),
    State.DONE: frozenset(),
    State.UNDONE: frozenset(),
    State.KEPT: frozenset(),
    State.LEFT: frozenset(),
}
"""
What may follow what; to stay is always allowed. COPYING and SAFE go to SWITCHED where somebody else ended the job, or it ended
while nobody looked. A proof that fails enters nothing: the record stays, and the outcome is unknown.
"""

RECORDED = (State.COPYING, State.SWITCHING, State.SWITCHED, State.PROVED)
"""Those that a record can be in."""
