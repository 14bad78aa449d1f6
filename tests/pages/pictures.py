"""The pictures of docs/pictures/: a chain before and after, the states of a merge, and speed against peers."""

from collections.abc import Sequence
from itertools import pairwise

from speed.figures import BARE, OURS, VIRSH

from pages import speed
from pages.drawing import Drawing
from pages.states import after
from qmpmerge.chain.state import NEXT, State

WIDTH = 760


def _legend(drawing: Drawing, y: float, kinds: Sequence[tuple[str, str]]) -> None:
    for number, (fill, text) in enumerate(kinds):
        drawing.box(20 + number * 220, y, 16, 16, fill)
        drawing.words(44 + number * 220, y + 13, text, "soft small")


OLD, EITHER, NEW = "grey", "warm", "calm"
CHAIN = {
    State.PLANNED: OLD,
    State.COPYING: OLD,
    State.SAFE: OLD,
    State.SWITCHING: EITHER,
    State.SWITCHED: NEW,
    State.PROVED: NEW,
    State.DONE: NEW,
}
"""The states on the way, in their order, and which chain is right in each."""


# --- a chain before and after ------------------------------------------------------------------------------------------


def chain() -> str:
    """What an intermediate merge, an active one and a pull make of four images."""
    rows = [
        ("before", "", ["base.raw", "a.qcow2", "b.qcow2", "c.qcow2"]),
        ("commit --top b.qcow2", "a and b go into the base", ["base.raw", "", "", "c.qcow2"]),
        ("commit", "all goes into the base; the guest moves there", ["base.raw", "", "", ""]),
        ("pull", "all goes into c; the base is only read", ["", "", "", "c.qcow2"]),
    ]
    told = "; ".join(f"{what}: {' <-- '.join(filter(None, images))}" for what, _, images in rows)
    drawing = Drawing(WIDTH, 296, "A chain before and after", told)
    for number, (what, how, images) in enumerate(rows):
        _chain_row(drawing, 20 + number * 60, what, how, images)
    legend = [("cool", "the guest writes to it"), ("grey", "only read"), ("gone", "no part of the chain any more")]
    _legend(drawing, 264, legend)
    return str(drawing)


def _chain_row(drawing: Drawing, y: float, what: str, how: str, images: Sequence[str]) -> None:
    drawing.words(20, y + (17 if how else 25), what)
    if how:
        drawing.words(20, y + 35, how, "soft small")
    there = [number for number, image in enumerate(images) if image]
    places = {number: 320 + number * 108 for number in there}
    for number in set(range(len(images))) - set(there):
        drawing.box(320 + number * 108, y, 84, 40, "gone")
    for number in there:
        drawing.box(places[number], y, 84, 40, "cool" if number == there[-1] else "grey")
        drawing.words(places[number] + 42, y + 25, images[number], anchor="middle")
    for below, above in pairwise(there):
        drawing.arrow(f"M{places[above]} {y + 20}H{places[below] + 87}")


# --- the states of a merge ---------------------------------------------------------------------------------------------


def states() -> str:
    """The way through the states, and the ways out of each."""
    told = "; ".join(f"{state.name} to {', '.join(after(state))}" for state in CHAIN if NEXT[state])
    drawing = Drawing(WIDTH, 234, "The states of a merge", told)
    places = {state: 20 + number * 104 for number, state in enumerate(CHAIN)}
    for state, x in places.items():
        drawing.box(x, 70, 88, 36, CHAIN[state])
        drawing.words(x + 44, 93, state.name, "small", anchor="middle")
        _ways_out(drawing, state, x)
        for there, place in places.items():
            if there in NEXT[state]:
                _on(drawing, x, place)
    legend = [(OLD, "the old chain is right"), (EITHER, "only the evidence decides"), (NEW, "the new chain is right")]
    _legend(drawing, 202, legend)
    return str(drawing)


def _ways_out(drawing: Drawing, state: State, x: float) -> None:
    out = [there for there in State if there in NEXT[state] and there not in CHAIN]
    if not out:
        return
    drawing.arrow(f"M{x + 44} 106V124")
    for number, there in enumerate(out):
        drawing.words(x + 44, 140 + number * 18, there.name, "soft small", anchor="middle")


def _on(drawing: Drawing, begin: float, end: float) -> None:
    skipped = round((end - begin) / 104) - 1
    if skipped:  # somebody else ended the job, or it ended while nobody looked
        drawing.arrow(f"M{begin + 44} 70V{66 - 18 * skipped}H{end + 28 + 16 * skipped}V67")
    else:
        drawing.arrow(f"M{begin + 88} 88H{end - 2}")


# --- speed against peers -----------------------------------------------------------------------------------------------


BARS = {OURS: "strong", VIRSH: "peer", BARE: "bare"}


def bars() -> str:
    """The live merges of docs/speed.md."""
    rows = [*speed.cases("live merge", speed.LIVE)]
    longest = max(median for _, medians in rows for median in medians.values())
    told = "; ".join(
        f"{name}: {', '.join(f'{peer} {medians[peer]:.0f} ms' for peer in BARS if peer in medians)}"
        for name, medians in rows
    )
    drawing = Drawing(WIDTH, 54 + 66 * len(rows), "Live merges: qmpmerge, virsh, bare QMP", told)
    for number, (peer, fill) in enumerate(BARS.items()):
        drawing.box(200 + number * 120, 18, 14, 14, fill, framed=False)
        drawing.words(220 + number * 120, 30, peer, "small")
    for number, (name, medians) in enumerate(rows):
        y = 52 + 66 * number
        drawing.words(186, y + 30, name, "small", anchor="end")
        for bar, (peer, fill) in enumerate((peer, fill) for peer, fill in BARS.items() if peer in medians):
            length = max(1, 480 * medians[peer] / longest)
            drawing.box(200, y + 18 * bar, length, 14, fill, framed=False)
            drawing.words(206 + length, y + 12 + 18 * bar, f"{medians[peer]:.0f} ms", "soft small")
    return str(drawing)
