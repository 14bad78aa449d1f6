"""How long we stay with a job that belongs to QEMU."""

import time
from dataclasses import dataclass, field


@dataclass
class Patience:
    """
    `timeout` seconds from now on, None for no limit; then the job goes on without us. With `detach` we leave as soon as it
    has been started.

    To leave at any other time, call `leave` and cancel the task: without `leave` a cancelled task cancels the job.
    """

    timeout: float | None = None
    detach: bool = False
    leaving: bool = False
    deadline: float | None = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = None if self.timeout is None else time.monotonic() + self.timeout

    def begin_again(self) -> None:
        """Count the time from now on: the user was asked something meanwhile."""
        self.__post_init__()

    @property
    def left(self) -> float | None:
        """Seconds until the limit, None where there is none."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def leave(self) -> None:
        """From now on a cancelled task leaves the job to QEMU."""
        self.leaving = True

    def is_leaving(self) -> bool:
        """Whether somebody wants us to leave at once, even where a job is just being taken back."""
        return self.leaving
