"""What is asked of an operation, as one value."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qmpmerge.chain.outcome import Ending, Policy
from qmpmerge.engine.pace.patience import Patience
from qmpmerge.errors import LiveOnly, OptionsConflict
from qmpmerge.qemu.bitmaps import Handling

if TYPE_CHECKING:
    from qmpmerge.engine.pace.converge import Converge


@dataclass(frozen=True)
class Request:
    """
    `base`, `top` and `shallow` say which layers, as `plan.commit` takes them. `ending` is how an active merge ends.
    `speed` is bytes a second, 0 for unlimited. `verify` compares what base shows with what top shows before anything is
    switched; None does so where it is cheap. `bitmaps` says what becomes of the dirty bitmaps of merged images,
    `merged_files` what becomes of their files; `pause` lets the guest stand still for the pivot. `force` and `search` are
    those of `checks.check`. `converge` allows to slow down or pause a guest that writes faster than the job copies. With
    `polite` the monitor is released for so many seconds between two polls. `patience` is how long we stay.
    """

    base: str | None = None
    top: str | None = None
    shallow: bool = False
    ending: Ending = "pivot"
    speed: int = 0
    verify: bool | None = None
    bitmaps: Handling = "refuse"
    merged_files: Policy = "stash"
    pause: bool = True
    force: Collection[str] = ()
    search: Collection[str] = ()
    dry_run: bool = False
    converge: "Converge | None" = None
    polite: float | None = None
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        """Whoever helps a guest must have the monitor at hand. Raises OptionsConflict."""
        if self.converge is not None and self.polite is not None:
            raise OptionsConflict(options=["--converge", "--polite"])

    @property
    def option(self) -> str:
        """What makes `qmpmerge job ... follow` end it like this."""
        return {"pivot": "", "keep": " --keep-overlay", "ready": " --wait-ready"}[self.ending]

    @property
    def compares(self) -> bool | None:
        """Like `verify`; what is to be deleted must be compared."""
        return True if self.merged_files == "delete" else self.verify

    def refuse_offline(self) -> None:
        """Offline nothing goes on without us. Raises LiveOnly."""
        if self.ending == "ready" or self.patience.detach:
            raise LiveOnly(option="--detach" if self.patience.detach else "--wait-ready")
