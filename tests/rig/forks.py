"""
The command in forks of one process that has imported it already, each with streams, folder and environment of its own: what
it does is a tenth of what its start takes.

``python forks.py DESCRIPTOR`` is that process. What to run comes in as JSON, with the three streams; the exit code goes out. A
run that takes too long is ended by its alarm, exit code -14.
"""

import atexit
import contextlib
import ctypes
import gc
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

LONGEST = 1024 * 1024
"""Bytes of a message."""
_PR_SET_PDEATHSIG = 1


class Forks:
    """Such a process, in UTF-8 mode, in which the command starts itself anew in other locales; `run` it, and `close` it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST)
        with theirs:
            command = [sys.executable, "-X", "utf8", __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)

    def run(
        self,
        arguments: Sequence[str],
        *,
        script: str | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        seconds: int = 0,
    ) -> "subprocess.CompletedProcess[bytes]":
        """
        One run of the command, or of the `script` that is more than it, in a folder and with what is to be added to the
        environment. It has ended when nobody has its output open any more; 0 `seconds` are any number of them.
        """
        environment = {**os.environ, **(env or {})}
        sent = json.dumps([script, arguments, str(cwd or os.getcwd()), environment, seconds]).encode()
        out, err = os.pipe(), os.pipe()
        with open(os.devnull, "rb") as nothing:
            socket.send_fds(self._socket, [sent], [nothing.fileno(), out[1], err[1]])
        os.close(out[1])
        os.close(err[1])
        said = _read(out[0], err[0])
        return subprocess.CompletedProcess(list(arguments), json.loads(self._socket.recv(LONGEST)), *said)

    def close(self) -> None:
        """End it, and what still runs in it."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


def _read(*pipes: int) -> list[bytes]:
    """What comes out of them, until their ends."""
    said = dict.fromkeys(pipes, b"")
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for pipe in pipes:
            stack.callback(os.close, pipe)
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                part = os.read(key.fd, 65536)
                said[key.fd] += part
                if not part:
                    selector.unregister(key.fd)
    return list(said.values())


@contextlib.contextmanager
def forks() -> Iterator[Forks]:
    """One that nobody else uses for as long as the block runs; another one has it afterwards, unless the block fails."""
    server = _IDLE.pop() if _IDLE else Forks()
    try:
        yield server
    except BaseException:
        server.close()
        raise
    _IDLE.append(server)


_IDLE: list[Forks] = []


@atexit.register
def _close_all() -> None:
    for server in _IDLE:
        server.close()


# --- that process ----------------------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> None:
    import qmpmerge
    from qmpmerge.cli import no_tls

    no_tls.import_asyncio()
    for module in pkgutil.walk_packages(qmpmerge.__path__, "qmpmerge."):
        if not module.name.endswith("__main__") and not module.name.startswith("qmpmerge.testing"):
            __import__(module.name)
    libc = ctypes.CDLL(None)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all of it
    while True:
        message, streams, *_ = socket.recv_fds(connection, LONGEST, 3)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            _become(streams, *json.loads(message))
        for stream in streams:
            os.close(stream)
        _, status = os.waitpid(pid, 0)
        connection.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())


def _become(
    streams: Sequence[int],
    script: str | None,
    arguments: Sequence[str],
    folder: str,
    environment: Mapping[str, str],
    seconds: int,
) -> None:
    from qmpmerge import cli

    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, max(streams) + 1)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        signal.alarm(seconds)
        sys.argv = [script or "qmpmerge", *arguments]
        if script is None:
            cli.main()
        else:
            runpy.run_path(script, run_name="__main__")
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(99)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # as for the tests
    with contextlib.suppress(KeyboardInterrupt):
        serve(socket.socket(fileno=int(sys.argv[1])))
