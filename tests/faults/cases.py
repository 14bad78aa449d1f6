"""
The matrix: named cases, each of which must end with the data right and the state named, or with a loud refusal.

A case is either a sweep of this bench, or a fault that a test of the suite proves on real QEMUs already: then the case
names the test, and the table runs it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal, cast, get_args

from faults import darkness, recovering, sweeps, tidying, tools
from faults.fuzz import FUZZED, Fuzzed
from faults.stage import Doer, Pulls, Story
from faults.sweeps import Bench, Sweep

Ends = Literal["right", "refused", "either", "limit"]
"""
The data right and the state named; or refused, with nothing touched; or one of both, by where the fault strikes. A
``limit`` is what no tool outside QEMU can see yet: its figures are shown beside the others and not counted among them.
"""

SweepOf = Callable[[Bench, Story, Doer], Sweep]


@dataclass(frozen=True)
class Swept:
    """A case that a sweep proves. `base_line`: whether a plain block-commit goes through the same."""

    id: str
    title: str
    story: Story
    sweep: SweepOf
    layout: str = "qcow2"
    base_line: bool = True
    ends: Ends = "right"


@dataclass(frozen=True)
class Tested:
    """A case that tests of the suite prove: their ids without parameters, below ``tests/``."""

    id: str
    title: str
    tests: tuple[str, ...]
    ends: Ends = "refused"


LIVE, LIVE_ACTIVE = Story(), Story(pivots=True)
NETWORK, NETWORK_ACTIVE = Story(network=True), Story(pivots=True, network=True)
OFFLINE, OFFLINE_ACTIVE = Story(offline=True), Story(pivots=True, offline=True)
WRITING, WRITING_ACTIVE = Story(writes=True), Story(pivots=True, writes=True)
ALL = {"L": LIVE, "LA": LIVE_ACTIVE, "W": WRITING, "WA": WRITING_ACTIVE, "N": NETWORK, "NA": NETWORK_ACTIVE,
       "O": OFFLINE, "OA": OFFLINE_ACTIVE}  # fmt: skip
IDLE = {name: story for name, story in ALL.items() if not story.writes}
PULLS = {
    f"{where}{kind[:1].upper()}P": replace(story, pulls=kind)
    for where, story in {"L": LIVE, "O": OFFLINE}.items()
    for kind in get_args(Pulls)
    if kind
}
HELD = {
    f"{name}H": replace(story, holds=True) for name, story in {"L": LIVE, "W": WRITING, "LWP": PULLS["LWP"]}.items()
}
LAYOUTS = ("raw-base", "large-clusters", "small-clusters", "extended-l2", "lazy-refcounts")


def kill_together(bench: Bench, story: Story, doer: Doer) -> Sweep:
    """All that is seen dies, at every operation of all that is seen: offline that is the whole merge."""
    return sweeps.kills(bench, story, doer, victims="all", gated="names")


def lose_server(bench: Bench, story: Story, doer: Doer) -> Sweep:
    """The server of the images dies at each operation, with all that no flush has covered."""
    return sweeps.kills(bench, story, doer, victims="server")


def swept() -> Iterator[Swept]:
    """The cases that this bench sweeps through."""
    for name, story in ALL.items():
        yield Swept(f"K-{name}", "machine killed after each operation", story, sweeps.kills)
    for layout, name in product(LAYOUTS, ("L", "LA")):
        yield Swept(f"K-{name}-{layout}", f"the same with {layout}", ALL[name], sweeps.kills, layout)
    for name in ("O", "OA"):
        yield Swept(f"KB-{name}", "qmpmerge and its daemon killed together", ALL[name], kill_together, base_line=False)
    for name, story in ALL.items():
        yield Swept(f"P-{name}", "power cut at any time", story, sweeps.power_cuts)
    for layout in LAYOUTS:
        yield Swept(f"P-L-{layout}", f"the same with {layout}", LIVE, sweeps.power_cuts, layout)
    yield Swept(
        "PN-WA", "power cut at a pivot, names, times and record too", WRITING_ACTIVE, darkness.sweep, base_line=False
    )
    for name, story in IDLE.items():
        for_ever = partial(sweeps.errors, for_ever=True)
        yield Swept(f"E1-{name}", "each operation fails once", story, sweeps.errors, ends="either")
        yield Swept(f"EE-{name}", "each operation fails, and its file for ever", story, for_ever, ends="either")
    for name in ("N", "NA"):
        back = replace(ALL[name], reconnects=True)
        yield Swept(f"ND-{name}", "the server of the images dies", ALL[name], lose_server, ends="either")
        ends: Ends = "limit" if back.pivots else "either"
        yield Swept(f"NB-{name}", "it comes back, and QEMU hides what is lost", back, lose_server, ends=ends)
    yield from killed_tools()
    yield from pulls()
    yield from held()
    for name in ("L", "LA", "O", "OA"):
        title = f"tidy of {tidying.VMS * 2} disks killed, and run again"
        yield Swept(f"TT-{name}", title, ALL[name], tidying.sweep, base_line=False)
    if recovering.is_there():
        for name in ("L", "LA", "O", "OA"):
            title = "recover killed at each of its steps"
            yield Swept(f"R-{name}", title, ALL[name], recovering.sweep, base_line=False)


def pulls() -> Iterator[Swept]:
    """Pulls, beside a plain block-stream."""
    for name, story in PULLS.items():
        yield Swept(f"K-{name}", "machine killed after each operation", story, sweeps.kills)
        yield Swept(f"P-{name}", "power cut at any time", story, sweeps.power_cuts)
        yield Swept(f"E1-{name}", "each operation fails once", story, sweeps.errors, ends="either")
        for_ever = partial(sweeps.errors, for_ever=True)
        yield Swept(f"EE-{name}", "each operation fails, and its file for ever", story, for_ever, ends="either")
    for name in ("LWP", "LPP"):
        writing = replace(PULLS[name], writes=True)
        yield Swept(f"K-{name}W", "machine killed after each operation", writing, sweeps.kills)
        victims: tuple[tools.Victim, ...] = ("tool", "both")
        for victim in victims:
            at_commands = partial(tools.at_commands, victim=victim)
            title = f"{'qmpmerge' if victim == 'tool' else 'qmpmerge and the machine'} killed at each command"
            yield Swept(f"TC-{name}-{victim}", title, PULLS[name], at_commands, base_line=False)


def held() -> Iterator[Swept]:
    """Held, and gone on with by the same command; of the tools the one that goes on is killed."""
    for name, story in HELD.items():
        yield Swept(f"K-{name}", "machine killed after each operation", story, sweeps.kills, base_line=False)
        yield Swept(f"P-{name}", "power cut at any time", story, sweeps.power_cuts, base_line=False)
        errors = partial(sweeps.errors, for_ever=True)
        title = "each operation fails, and its file for ever"
        yield Swept(f"EE-{name}", title, story, errors, base_line=False, ends="either")
        victims: tuple[tools.Victim, ...] = ("tool", "both") if not story.writes else ()
        for victim in victims:
            at_commands = partial(tools.at_commands, victim=victim)
            title = f"{'qmpmerge' if victim == 'tool' else 'qmpmerge and the machine'} killed at each command"
            yield Swept(f"TC-{name}-{victim}", title, story, at_commands, base_line=False)


def killed_tools() -> Iterator[Swept]:
    """The cases in which qmpmerge itself dies beside a machine."""
    victims: tuple[tuple[tools.Victim, str], ...] = (("tool", "qmpmerge"), ("both", "qmpmerge and the machine"))
    for name, (victim, who) in product(("L", "LA"), victims):
        at_commands = partial(tools.at_commands, victim=victim)
        at_files = partial(tools.at_files, victim=victim)
        yield Swept(f"TC-{name}-{victim}", f"{who} killed at each command", ALL[name], at_commands, base_line=False)
        yield Swept(f"TF-{name}-{victim}", f"{who} killed at each file", ALL[name], at_files, base_line=False)


def tested() -> list[Tested]:
    """The cases of ``suite.txt``."""
    cases: list[Tested] = []
    for line in Path(__file__).with_name("suite.txt").read_text().splitlines()[1:]:
        name, ends, title, tests = (part.strip() for part in line.split("|"))
        assert ends in get_args(Ends), line
        cases.append(Tested(name, title, tuple(tests.split()), cast(Ends, ends)))
    return cases


CASES: list[Swept | Tested | Fuzzed] = [*swept(), *tested(), *FUZZED]


def find(words: list[str]) -> list[Swept | Tested | Fuzzed]:
    """The cases whose ids begin with one of `words`; all without any."""
    return [case for case in CASES if not words or any(case.id.startswith(word) for word in words)]
