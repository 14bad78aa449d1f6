"""The note in the lock beside a base, for who comes next."""

import contextlib
from dataclasses import dataclass
from typing import Any

from qmpmerge.chain import plan
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.chain.plan import CommitPlan, commit
from qmpmerge.errors import Refused
from qmpmerge.journal import locks
from qmpmerge.qemu import jobs

SCHEMA = 1


@dataclass(frozen=True)
class Earlier:
    """A merge that was begun before us, as its note tells it. `since` is in seconds since 1970."""

    job: str
    since: float
    plan: CommitPlan
    old_nodes: list[str]
    base_driver: str

    def is_done(self, chain: Chain) -> bool:
        """Whether the chain is what that merge was to leave; its headers are looked at when it is proved."""
        return chain.same_files(self.plan.result)

    def is_what(self, *, base: str | None, top: str | None, shallow: bool) -> bool:
        """Whether these words, said of the chain as it was, mean the very same merge."""
        # By name, not by inode: a merged file may have been moved away since.
        images = tuple(Image(image.file, image.format, image.virtual_size, image.node) for image in self.plan.chain)
        try:
            meant = commit(Chain(images), base=base, top=top, shallow=shallow)
        except Refused:
            return False
        return meant.base.file == self.plan.base.file and meant.top.file == self.plan.top.file


def place(planned: CommitPlan) -> Image:
    """The image beside which the lock lies: the base, else the lowest merged image that has a path."""
    return next((image for image in (planned.base, *planned.merged) if image.has_path), planned.base)


def find(chain: Chain) -> Earlier | None:
    """The merge that a note beside an image of this chain tells of; a note that makes no sense is none."""
    for image in chain:
        told = locks.noted(image)
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, Refused):
            return _read(told or {})
    return None


def _read(told: dict[str, Any]) -> Earlier:
    images = tuple(Image(**{**entry, "inode": tuple(entry["inode"] or ()) or None}) for entry in told["images"])
    planned = plan.commit(Chain(images), base=f"[{told['base']}]", top=f"[{told['top']}]")
    if told["schema"] != SCHEMA or not str(told["job"]).startswith(jobs.PREFIX):
        raise ValueError
    since, driver = float(told["since"]), str(told["base_driver"])
    return Earlier(str(told["job"]), since, planned, [str(node) for node in told["old_nodes"]], driver)


def suspicion(planned: CommitPlan) -> str | None:
    """The error of an earlier merge into this base after which what it shows must be compared."""
    told = locks.noted(place(planned)) or {}
    return str(told["suspect"]) if told.get("suspect") else None
