"""Clean Debian systems, each in a folder: what a package needs must come with it, and go with it."""

import contextlib
import fcntl
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rig.machines import run

REPOSITORY = Path(__file__).parents[2]
CACHE = REPOSITORY / ".cache/roots"
SOURCES = REPOSITORY / "scripts/debian-sources"
INSTALL = REPOSITORY / "docs/install.md"
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


class Root:
    """A Debian in a folder, with processes of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def run(self, *command: str | Path) -> str:
        """Run it there, with nothing but what a login has; what it has printed."""
        unshare = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            f"--mount-proc={self.place}/proc",
            "chroot",
            str(self.place),
        ]
        environment = ["env", "-i", f"PATH={PATH}", "HOME=/root", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"]
        return run(*unshare, *environment, *command)

    def apt(self, *words: str) -> str:
        """apt-get, without questions."""
        return self.run("apt-get", "--yes", "--no-install-recommends", *words)

    def put(self, file: Path) -> str:
        """Copy a file there; its path inside."""
        shutil.copy2(file, self.place / "root")
        return f"/root/{file.name}"

    def files(self) -> set[str]:
        """All that is there, but for what apt and dpkg keep for themselves, and what runs leave in /tmp."""
        return set(run("find", ".", "-xdev", *_LEFT_OUT, "-printf", r"/%P\n", cwd=self.place).splitlines())


_LEFT_OUT = [
    word
    for path in ("./tmp", "./root", "./var/log", "./var/cache", "./var/lib/apt", "./var/lib/dpkg")
    for word in ("-path", path, "-prune", "-o")
]


@contextlib.contextmanager
def root(suite: str, place: Path) -> Iterator[Root]:
    """A new one of that suite, removed at the end; where apt finds what docs/install.md lets it find."""
    place.mkdir()
    run("tar", "--extract", "--file", _archive(suite), "--directory", place)
    try:
        yield Root(place)
    finally:
        shutil.rmtree(place)


def _archive(suite: str) -> Path:
    """Made once; two that need it at the same time take turns."""
    CACHE.mkdir(parents=True, exist_ok=True)
    archive = CACHE / f"{suite}.tar"
    with (CACHE / f"{suite}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not archive.exists():
            _make(suite, archive)
    return archive


def _make(suite: str, archive: Path) -> None:
    files = {
        "etc/apt/apt.conf.d/host": run("apt-config", "dump", "Acquire"),  # how this machine reaches its mirror
        "etc/apt/sources.list.d/unstable.sources": run(SOURCES, "unstable"),
        "etc/apt/preferences.d/qmpmerge": _preferences(),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).parent.mkdir(parents=True)
            (Path(folder) / name).write_text(text)
        unfinished = archive.with_suffix(".new.tar")
        options = ["--quiet", "--variant=minbase", "--include=bash-completion,man-db"]
        hook = f"--customize-hook=copy-in {folder}/etc /"
        command = ["mmdebstrap", *options, hook, suite, str(unfinished), "-"]
        subprocess.run(command, input=run(SOURCES, suite), text=True, check=True)
    unfinished.rename(archive)


def _preferences() -> str:
    """As docs/install.md tells them."""
    _, first, text = INSTALL.read_text().partition("Package: *\n")
    return first + text[: text.index("END\n")]
