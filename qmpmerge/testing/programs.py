"""QEMU's programs: which ones a test uses, and how they are run."""

import functools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SYSTEM = ("qemu-system-x86_64", "qemu-kvm", "/usr/libexec/qemu-kvm")
"""What an emulator of a PC is called."""


LAUNCHERS = {"setpriv": "util-linux", "stdbuf": "coreutils"}
"""What a QEMU is started by, and the packages that have it."""


class NoQemu(Exception):
    """There is none; the message says where it was looked for."""


@dataclass(frozen=True)
class Programs:
    """The programs of one QEMU: `system` is the emulator, `folder` where the others are looked for first, None for PATH."""

    system: str | None
    folder: str | None = None

    @property
    def emulator(self) -> str:
        """The path of the emulator. Raises NoQemu."""
        for program, package in LAUNCHERS.items():
            if shutil.which(program) is None:
                raise NoQemu(f"no {program} on PATH, by which QEMU is started: it comes with {package}")
        if self.system is None:
            raise NoQemu(f"no QEMU: none of {', '.join(SYSTEM)} is there; install one, or name it by --qemu-path")
        return self.system

    @property
    def version(self) -> str:
        """That of the emulator, such as ``10.0.2``. Raises NoQemu."""
        return _version(self.emulator)

    @property
    def path(self) -> str:
        """PATH, with the folder of these programs first."""
        path = os.environ.get("PATH", os.defpath)
        return f"{self.folder}{os.pathsep}{path}" if self.folder else path

    @classmethod
    def at(cls, place: str) -> "Programs":
        """Those of a folder, or of an emulator's own path and beside it. Raises NoQemu."""
        path = Path(place).absolute()
        if path.is_dir():
            found = next((shutil.which(name, path=str(path)) for name in SYSTEM[:2] if (path / name).exists()), None)
            folder = path
        else:
            found, folder = shutil.which(str(path)), path.parent
        if found is None:
            raise NoQemu(f"{place}: no QEMU, and no folder with {' or '.join(SYSTEM[:2])} in it")
        return cls(found, str(folder))

    @classmethod
    def found(cls) -> "Programs":
        """Those on PATH, as far as there are any."""
        return cls(next(filter(None, map(shutil.which, SYSTEM)), None))


@functools.cache
def _version(system: str) -> str:
    said = run(system, "--version")
    found = re.search(r"version (\d+\.\d+\.\d+)", said)
    return found[1] if found else said.splitlines()[0]


def escaped(path: Path | str) -> str:
    """A name as QEMU's options take it."""
    return str(path).replace(",", ",,")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a program and return its output; its failure fails the test, with all that it said."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout
