"""
Live merges on a paused QEMU: qmpmerge as a whole command, virsh as a whole command, the bare QMP conversation.

Durable at the end on all sides: the clock stops when base and active image are synced. Ours are by then, and so is an active
merge of any; the others come back from an intermediate one up to half a second earlier (1 GiB).
"""

import time
from pathlib import Path

from rig.disks import device
from rig.machines import machine

from speed.figures import BARE, OURS, VIRSH, Figures, alternating
from speed.images import DataChain, data_chain, deep_chain
from speed.peers import Libvirt, bare, ours, timed

LAYERS = 3


def measure(figures: Figures, folder: Path, runs: int, peer: Libvirt | None, sizes: list[int]) -> None:
    """Intermediate and active merges of so many MiB in three layers."""
    for megabytes in sizes:
        chain = data_chain(folder / f"live-{megabytes}", LAYERS, megabytes)
        for active in (False, True):
            kind = "active, pivot" if active else "intermediate"
            name = f"{kind}, {megabytes} MiB in {LAYERS} layers"
            for who in alternating(runs, [OURS, BARE, *([VIRSH] if peer else [])]):
                chain.put_back()
                merge_once(figures, "live merge", name, who, chain, active=active, peer=peer)
        chain.remove()


def deep(figures: Figures, folder: Path, runs: int, peer: Libvirt | None, lengths: list[int]) -> None:
    """One empty layer in the middle of so many, whose headers have relative names."""
    for length in lengths:
        chain = deep_chain(folder / f"deep-{length}", length)
        for who in alternating(runs, [OURS, BARE, *([VIRSH] if peer else [])]):
            chain.put_back()
            merge_once(figures, "live merge", f"one of {length} layers", who, chain, active=False, peer=peer)


def merge_once(
    figures: Figures, section: str, name: str, who: str, chain: DataChain, *, active: bool, peer: Libvirt | None = None
) -> None:
    """One merge by one peer, on a QEMU that is started for it."""
    if who == VIRSH:
        assert peer is not None
        figures.add(section, name, who, _virsh(peer, chain, active=active))
        return
    options = [] if active else chain.middle
    with machine(chain.base.parent, "-drive", f"file={chain.active},if=none,id=vda", *device("vda")) as vm:
        if who == OURS:
            took = ours("commit", vm.target, "vda", *options).milliseconds
        else:
            took = bare(vm.session, chain.merge(active=active))
        figures.add(section, name, who, took + _syncing(chain))


def _syncing(chain: DataChain) -> float:
    begun = time.perf_counter()
    chain.sync()
    return (time.perf_counter() - begun) * 1000


def _virsh(peer: Libvirt, chain: DataChain, *, active: bool) -> float:
    peer.let_in(chain.base.parent)
    ending = ["--active", "--pivot"] if active else ["--top", chain.top]
    with peer.domain(chain.active) as domain:
        words = ("blockcommit", domain, "vda", "--wait", "--verbose", "--base", chain.base, *ending)
        return timed(*peer.virsh(*words)).milliseconds + _syncing(chain)
