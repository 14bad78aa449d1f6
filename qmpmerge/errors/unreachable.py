"""Errors of getting a session with QEMU: nothing was changed."""

from qmpmerge.errors.base import Unreachable
from qmpmerge.errors.nearest import question


class NoSuchTarget(Unreachable):
    """TARGET is neither a path that exists nor a running QEMU. `command` is what was meant where words were swapped."""

    target: str
    nearest: str | None = None
    command: str = ""
    sentence = "{what} {target}"
    advice = "`qmpmerge vms` lists the running QEMUs and their monitors"

    @property
    def hint(self) -> str:
        """What may have been meant; what has a slash is no VM's name."""
        meant = question(self.nearest)
        if self.command:
            return f"{meant}TARGET comes first, as in `{self.command}`"
        look = "look at the path; " if "/" in self.target and not meant else ""
        return meant + look + super().hint

    def _words(self) -> dict[str, object]:
        is_path = "/" in self.target and not self.target.startswith("tcp:")
        return {
            **super()._words(),
            "what": "no file and no socket is at" if is_path else "no socket and no running QEMU called",
        }


class AmbiguousName(Unreachable):
    """Two running QEMUs have the name."""

    target: str
    pids: list[int]
    sentence = "{target} is the name of more than one running QEMU, pids {pids}"
    advice = "name one by its pid, as in `pid:{first}`"

    def _words(self) -> dict[str, object]:
        return {**super()._words(), "first": self.pids[0]}


class NoMonitor(Unreachable):
    """A running QEMU without a QMP monitor socket."""

    target: str
    pid: int
    sentence = "no QMP monitor socket of {target} (pid {pid}) can be found"
    advice = "start it with `-qmp unix:/run/vm.sock,server=on,wait=off`, or name its socket if you know it"


class MonitorTaken(Unreachable):
    """Another QEMU answers on the monitor of the one that was named: it was started later with the same path."""

    target: str
    pid: int
    other: int | None
    sentence = "the monitor of {target} (pid {pid}) now belongs to another QEMU (pid {other})"
    advice = "name that one, as in `pid:{other}`, or give each VM a monitor path of its own"


class NotASocket(Unreachable):
    """TARGET exists but is no socket."""

    path: str
    kind: str
    sentence = "{path} is a {kind}, not a monitor socket"
    advice = "name the QMP monitor of a running QEMU; `qmpmerge vms` lists them"

    @property
    def hint(self) -> str:
        """As of any error; a folder is one of images where it is no slip."""
        if self.kind == "folder":
            return "name an image in it, or a QMP monitor (`qmpmerge vms`); `qmpmerge tidy` and `doctor` take folders"
        return super().hint


class Offline(Unreachable):
    """TARGET is an image, and the command is about a running QEMU."""

    path: str
    sentence = "{path} is an image file, and jobs are those of a running QEMU"
    advice = "name the monitor or the VM that uses it (`qmpmerge vms`)"


class NobodyListens(Unreachable):
    """The socket is there, nobody listens on it."""

    address: str
    sentence = "nobody listens on {address}: its QEMU is gone"
    advice = (
        "where a merge was under way run `qmpmerge recover` on the folder of its images before you start the VM again; "
        "`qmpmerge vms` lists the QEMUs that run"
    )


class WentAway(Unreachable):
    """The session ended while we only looked: nothing was sent that changes anything."""

    target: str
    command: str
    reason: str
    sentence = "{target} went away while we looked at it ({command}): {reason}"
    advice = (
        "nothing was changed; `qmpmerge vms` lists the QEMUs that run; where a merge was under way run `qmpmerge recover` on "
        "the folder of its images before you start the VM again"
    )


class NoPermission(Unreachable):
    """We may not connect."""

    address: str
    owner: str
    sentence = "no permission to connect to {address}, which belongs to {owner}"
    advice = "run qmpmerge as {owner}"


class CannotConnect(Unreachable):
    """Any other failure of connect(2)."""

    address: str
    reason: str
    sentence = "cannot connect to {address}: {reason}"
    advice = "is the address right? `qmpmerge vms` lists the monitors of this host"


class MonitorSilent(Unreachable):
    """
    Connected, but no greeting came.

    A QEMU monitor serves one client at a time: a second one connects and waits, possibly for ever. A stopped QEMU
    and a socket that speaks another protocol (a guest agent, say) look just the same.
    """

    address: str
    seconds: float
    holder: str
    stopped: bool = False
    pid: int | None = None
    sentence = "the monitor {address} did not greet us{within}: {holder}"
    advice = (
        "end that session, or give QEMU a second monitor (`-qmp unix:PATH,server=on,wait=off`); a `commit`, `pull` or `follow` "
        "of ours lets others in with `--polite`"
    )

    @property
    def hint(self) -> str:
        """As of any error; a process that is stopped goes on when it is told to."""
        return f"let it go on with `kill -CONT {self.pid}`" if self.stopped and self.pid else super().hint

    def _words(self) -> dict[str, object]:
        return {**super()._words(), "within": f" within {self.seconds:g} s" if self.seconds else ""}


class NotQmp(Unreachable):
    """Something else than QMP answers on the socket."""

    address: str
    got: str
    sentence = "{address} does not speak QMP: {got}"
    advice = "a human monitor (-monitor) will not do: QEMU needs `-qmp unix:PATH,server=on,wait=off`"
