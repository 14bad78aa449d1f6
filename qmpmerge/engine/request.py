"""What is asked of an operation, as one value."""

from collections.abc import Collection, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, get_args

from qmpmerge import given
from qmpmerge.chain.chain import Chain
from qmpmerge.chain.layer import LayerName
from qmpmerge.chain.outcome import Ending, Estimate, MergedFile, Outcome, Policy
from qmpmerge.chain.plan import Direction, Plan, keeping, planned
from qmpmerge.engine.pace.patience import Patience
from qmpmerge.errors import ActiveOnly, LiveOnly, NotAgreed, OptionsConflict
from qmpmerge.value import Value

if TYPE_CHECKING:
    from qmpmerge.engine.pace.converge import Converge


class Request(Value):
    """
    `direction`, `base`, `top` and `shallow` say which layers go where, as `plan.planned` takes them, or `base` and `keep`, as
    `plan.keeping` does. `ending` is how it
    ends. `speed` is bytes a second, 0 for unlimited; None leaves a job that is at work as fast as it is. `verify`
    compares what base shows with what top shows before anything is switched; None does so where it is cheap. `merged_files`
    says what becomes of the merged files (see `policy`); `pause` lets the guest stand still for the pivot. `force` and
    `search` are those of `checks.check`. `converge` allows to slow down or pause a guest that writes faster than the job
    copies. With `polite` the monitor is released for so many seconds between two polls. `patience` is how long we stay.
    `agreed` are the plans of which a merge that pivots must be one, None where it may be any. `estimate` is that
    of a dry run, where it is known already.
    """

    direction: Direction = "commit"
    base: LayerName | None = None
    top: LayerName | None = None
    shallow: bool = False
    keep: int | None = None
    ending: Ending = "pivot"
    speed: int | None = None
    verify: bool | None = None
    merged_files: Policy | None = None
    pause: bool = True
    force: Collection[str] = ()
    search: Collection[str] = ()
    dry_run: bool = False
    converge: "Converge | None" = None
    polite: float | None = None
    patience: Patience = field(default_factory=Patience)
    agreed: Sequence[Outcome] | None = None
    estimate: Estimate | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for what is none of these; OptionsConflict: whoever helps a guest must have the monitor at hand."""
        given.see(self.ending, Ending, "ending")
        given.see(self.merged_files, (None, *get_args(Policy)), "merged_files")
        given.see_count(self.speed, "speed")
        given.see_amount(self.polite, "polite")
        given.see_count(self.keep, "keep")
        given.forced(self.force)
        if self.keep is not None and (self.shallow or self.top is not None):
            raise OptionsConflict(options=["--keep", "--shallow" if self.shallow else "--top"])
        if self.keep == 0 and self.direction == "pull":
            raise OptionsConflict(options=["--keep 0", "--direction pull"])  # no overlay is left to pull into
        if self.converge is not None and self.polite is not None:
            raise OptionsConflict(options=["--converge", "--polite"])

    def refuse_not_agreed(self, plan: Plan, merged: tuple[MergedFile, ...]) -> None:
        """A merge that pivots may need a plan that was agreed to, of the very same files. Raises NotAgreed."""
        if self.agreed is None or not plan.pivots or self.ending != "pivot":
            return
        for one in self.agreed:
            same = plan.chain.same_files(one.before) and plan.result.same_files(one.after)
            if same and merged == one.merged:
                return
        raise NotAgreed(disk=plan.chain.active.file, chain=str(plan.chain))

    @property
    def option(self) -> str:
        """What makes `qmpmerge job ... follow` end it like this."""
        return {"pivot": "", "keep": " --keep-overlay", "hold": " --hold"}[self.ending]

    @property
    def compares(self) -> bool | None:
        """Like `verify`; what is to be deleted must be compared."""
        return True if self.merged_files == "delete" else self.verify

    def plan(self, chain: Chain, disk: str) -> Plan:
        """What is asked for, of this chain of a disk. Raises NoSuchLayer, BaseAboveTop, BaseIsTop, OptionsConflict."""
        if self.keep is not None:
            return keeping(self.direction, chain, self.keep, disk=disk, base=self.base)
        return planned(self.direction, chain, disk=disk, base=self.base, top=self.top, shallow=self.shallow)

    def policy(self, plan: Plan) -> Policy:
        """What becomes of the files of merged images: those that a pull has only read stay, unless the user says otherwise."""
        return self.merged_files or ("stash" if plan.direction == "commit" else "keep")

    def refuse_ending_of(self, plan: Plan) -> None:
        """What does not pivot leaves no overlay that could be kept. Raises ActiveOnly."""
        if self.ending == "keep" and not plan.pivots:
            more = {} if self.keep is None else {"instead": "with `--keep 0`"}
            raise ActiveOnly(option=self.option.strip(), top=plan.top.file, active=plan.chain.active.file, **more)

    def refuse_offline(self) -> None:
        """Offline nothing goes on without us, and there is no guest to help. Raises LiveOnly."""
        if self.patience.detach:
            raise LiveOnly(option="--detach")
        if self.ending == "hold":
            raise LiveOnly(
                option="--hold", instead=", and run it when the chain may change: it copies and switches at once"
            )
        if self.converge is not None:
            raise LiveOnly(option="--converge-pause" if self.converge.pause else "--converge")
