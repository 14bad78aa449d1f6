"""A few of the random chains, and those by which figures were once too low."""

from pathlib import Path
from typing import Any

import pytest
from rig.machines import MIB

from faults.growing import Chain, Layer, grown

ZEROS = [f"write -z {number}M 64k" for number in range(0, 16, 2)]
FULL = "write -P 1 0 16M"
LARGE = ["cluster_size=2M"]
DOTS = [f"write -P 1 {number}M 4k" for number in range(16)]


def qcow2(number: int, size: int, options: list[str] | None = None, writes: list[str] | None = None) -> Layer:
    return Layer(f"l{number}.qcow2", "qcow2", size, options or [], writes or [])


def raw(size: int, writes: list[str] | None = None) -> Layer:
    return Layer("l0.raw", "raw", size, [], writes or [])


ENLARGED = [qcow2(1, 8 * MIB), qcow2(2, 40 * MIB, [], ["write -P 1 2M 1M"]), qcow2(3, 40 * MIB)]
CASES: dict[str, tuple[list[Layer], str, dict[str, Any]]] = {
    "zeros in larger clusters, up": (
        [qcow2(0, 16 * MIB, [], [FULL]), qcow2(1, 16 * MIB, [], ZEROS), qcow2(2, 16 * MIB, LARGE)],
        "pull",
        {"base": "1"},
    ),
    "zeros in larger clusters, down": (
        [qcow2(0, 16 * MIB, [], [FULL]), qcow2(1, 16 * MIB, LARGE), qcow2(2, 16 * MIB, [], ZEROS)],
        "commit",
        {"base": "2"},
    ),
    "an enlarged disk": ([qcow2(0, 8 * MIB), *ENLARGED], "commit", {"top": "3"}),
    "an enlarged disk on raw": ([raw(8 * MIB), *ENLARGED], "commit", {"top": "3"}),
    "a raw image is read by chunks": ([raw(16 * MIB, DOTS), qcow2(1, 16 * MIB)], "pull", {}),
    "compressed": (
        [
            qcow2(0, MIB, [], [f"write -c -P 1 {number * 64}k 64k" for number in range(16)]),
            qcow2(1, MIB, [], ["write -P 2 0 1M"]),
        ],
        "commit",
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
async def test_what_is_foreseen_is_what_happens(name: str, tmp_path: Path) -> None:
    """But for reference counts, of which two clusters are foreseen at least."""
    figures = await grown(Chain(*CASES[name]), tmp_path)
    assert not isinstance(figures, str)
    foreseen, measured = figures
    assert measured <= foreseen <= measured + 2 * (2 * MIB if "larger" in name else 64 * 1024)


@pytest.mark.parametrize("seed", [104, 126, 135, 157, 1107])
async def test_no_random_chain_grows_by_more(seed: int, tmp_path: Path) -> None:
    """`scripts/faults FG` tries hundreds."""
    figures = await grown(Chain.of(seed), tmp_path)
    assert not isinstance(figures, str)
    assert figures[1] <= figures[0]
