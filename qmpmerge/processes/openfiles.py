"""
Where an image lies that a QEMU knows by some name: told by what the QEMU has open.

A name says less. QEMU may have left the folder from which a relative one was meant (`-daemonize`), and in another mount
namespace one name is two files. Our own working folder never has anything to do with it.
"""

import os
from functools import cached_property

from qmpmerge.chain.chain import ELSEWHERE
from qmpmerge.processes import proc
from qmpmerge.processes.proc import Identity

FDSET = "/dev/fdset/"
"""How names begin that QEMU gives to descriptors that were handed to it (`-add-fd`): no such files exist."""


class OpenFiles:
    """What the process `pid` has open, looked at once and only where it is needed; `pid` is None where it is not known."""

    def __init__(self, pid: int | None) -> None:
        self._pid = pid

    def locate(self, name: str) -> str:
        """
        An absolute path; ``qemu:NAME`` (`Image.is_elsewhere`) where none is known to lead to the file.

        A path is no proof: what lies there may have been put there after QEMU had opened its image, and where we may not
        look at the process an absolute name is taken as it is (`targets.identity` and `checks` deal with both).
        """
        return self._by_name(name) or self._by_descriptor(name) or f"{ELSEWHERE}{name}"

    def _by_name(self, name: str) -> str | None:
        """Where names lead as they did when the process opened them, and as they do for us."""
        if name.startswith(FDSET) or self._sees_our_files is False:
            return None
        if name.startswith("/"):
            return name
        folder = None if self._pid is None or proc.has_moved(self._pid) else proc.cwd(self._pid)
        return None if folder is None else os.path.join(folder, name)

    def _by_descriptor(self, name: str) -> str | None:
        """A path that leads to the only open file which the name can mean."""
        if self._pid is None or name.startswith(FDSET):
            return None
        folders = (proc.cwd(self._pid), proc.start_folder(self._pid))
        paths = [os.path.join(folder, name) for folder in folders if folder is not None]
        meant = {found for path in paths if (found := proc.identity(path)) in self._links}
        if not name.startswith("/"):
            tail = f"/{os.path.normpath(name).rpartition('../')[2]}"
            meant |= {found for found, link in self._links.items() if link.removesuffix(" (deleted)").endswith(tail)}
            paths += [link for found, link in self._links.items() if found in meant]
        return next((path for path in paths if len(meant) == 1 and proc.identity(path) in meant), None)

    @cached_property
    def _sees_our_files(self) -> bool | None:
        return None if self._pid is None else proc.sees_our_files(self._pid)

    @cached_property
    def _links(self) -> dict[Identity, str]:
        return {} if self._pid is None else proc.open_links(self._pid)
