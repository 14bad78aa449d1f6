"""
What a check is asked about, and how files are told apart.
"""

from qmpmerge.chain.chain import Image
from qmpmerge.chain.outcome import Ending, Estimate
from qmpmerge.chain.plan import Plan, PullPlan
from qmpmerge.images.dependents import Look
from qmpmerge.processes import proc
from qmpmerge.processes.proc import Identity
from qmpmerge.targets.target import ChainView, Target
from qmpmerge.value import Value


class Unseen(Value):
    """What a check yields where it could not look: it has not passed then, it is *not checked*."""

    reason: str


class Seen(Value):
    """What a check yields to say how much it has looked at."""

    what: str


class Question(Value):
    """
    All that a check may want to know. `pid` is QEMU's, None where it is not known; `opened` is what it has open. `others` is
    the look for images that are built on those of the chain.
    """

    target: Target
    pid: int | None
    opened: set[Identity]
    view: ChainView
    plan: Plan
    ending: Ending
    others: Look
    estimate: Estimate
    dry_run: bool

    @property
    def written(self) -> list[Image]:
        """The images that QEMU will write to."""
        return list(self.plan.written)

    @property
    def touched(self) -> list[Image]:
        """The images that play a part, base first."""
        return list(self.plan.touched)

    @property
    def relinked(self) -> list[Image]:
        """What leaves the chain, and the overlay: those whose headers tell what lies below them."""
        return [image for image in self.plan.touched if image is not self.plan.base]

    @property
    def rewrites(self) -> bool:
        """
        Whether QEMU is asked to rewrite the overlay's header as it is: where it records the right format for the backing file,
        the overlay's own. Not one in the middle that is pulled into: QEMU opens that for writing for this alone, and where its
        storage fails and goes on failing it aborts with the guest (7.2 to 11.1); a header that fails at the end of a pull harms
        nobody.
        """
        plan = self.plan
        if plan.overlay is None or (isinstance(plan, PullPlan) and plan.is_in_the_middle):
            return False
        return plan.overlay.format == plan.top.format and plan.overlay.backing is not None

    @property
    def keeps(self) -> bool:
        """Whether the guest keeps its overlay, and all that is in it."""
        return self.plan.pivots and self.ending == "keep"


def process(target: Target, plan: Plan) -> tuple[int | None, set[Identity]]:
    """QEMU's pid and what it has open; what answers on the monitor may be a relay, such as ssh, which is not QEMU."""
    from qmpmerge.processes import vms

    opened = set(proc.open_files(target.pid) or ()) if target.pid is not None else set()
    ours = {proc.identity(image.file) for image in plan.chain if image.has_path}
    if target.pid is None or not (opened & ours or vms.vm_of(target.pid) is not None):
        return None, set()
    return target.pid, opened
