"""
What a QEMU's command line says, read by QEMU's own rules: its name and its QMP monitors. Pure: no process is looked at.

`-readconfig` files are not read.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from qmpmerge.value import Value

_PROGRAM = re.compile(r"\.?(?:qemu-system-.+|qemu-kvm|kvm|qemu-storage-daemon)(?:-wrapped)?")
_LOADER = re.compile(r"ld(?:64|-linux.*|-musl.*|-\d.*)?\.so.*|ld-musl.*")

_LOOPBACK = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - nothing binds here

_DISKS = ("hda", "hdb", "hdc", "hdd")

# A socket chardev with one of these expects more than the bare protocol from who connects.
_NOT_PLAIN = ("telnet", "tn3270", "websocket", "tls-creds", "abstract")


class CommandLine(Value):
    """
    What a QEMU's command line tells. Monitors are listening QMP sockets: a path, ``tcp:HOST:PORT``, or ``fd:N``.

    `libvirt` says that the monitor is libvirt's by its id and was passed in as libvirt passes it.
    """

    program: str
    name: str
    monitors: tuple[str, ...]
    libvirt: bool
    images: tuple[str, ...] = ()
    """The absolute paths of files that disks are given by: with -drive, -blockdev, -hda and the like."""


def is_qemu(path: str) -> bool:
    """Whether a file of this name may run as QEMU: a QEMU, or a dynamic loader that runs one."""
    name = _basename(path)
    return bool(_PROGRAM.fullmatch(name) or _LOADER.fullmatch(name))


def parse(argv: Sequence[str], cwd: str | None, exe: str = "") -> CommandLine | None:
    """
    Read a command line; None when it is not that of a QEMU. Never raises.

    Without `cwd` relative socket paths are left out. `exe` is the path of the running file, if known.
    """
    program = _program(argv, exe)
    if not program:
        return None
    options = list(_options(argv))
    names = [_keys(text, "guest").get("guest", "") for option, text in options if option == "name"]
    chardevs = [_keys(text, "backend") for option, text in options if option == "chardev"]
    by_id = {keys.get("id", ""): keys for keys in chardevs}
    sockets = _qmp_sockets(options, by_id, daemon="qemu-storage-daemon" in program)
    addresses = [_address(keys, cwd) for keys in sockets]
    return CommandLine(
        program=program,
        name=next(filter(None, reversed(names)), ""),
        monitors=tuple(dict.fromkeys(filter(None, addresses))),
        libvirt="fd" in by_id.get("charmonitor", {}),
        images=tuple(dict.fromkeys(_images(options, cwd))),
    )


def _images(options: Iterable[tuple[str, str]], cwd: str | None) -> Iterator[str]:
    for option, text in options:
        for name in [text] if option in _DISKS else _file_names(text) if option in ("drive", "blockdev") else []:
            path = os.path.join(cwd or "", name.removeprefix("file:").removeprefix("./"))
            if path.startswith("/") and "\0" not in path:
                yield path


def _file_names(text: str) -> Iterator[str]:
    """What a drive or a node is opened by, in either of its forms."""
    if text.startswith("{"):
        yield from _names_within(_decoded(text))
        return
    keys = _keys(text, "driver")
    for key in ("file", "filename", "file.filename"):
        if key in keys and (key != "file" or "node-name" not in keys):
            yield keys[key]


def _names_within(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "filename" and isinstance(item, str):
                yield item
            yield from _names_within(item)


def _program(argv: Sequence[str], exe: str) -> str:
    """The program's name; behind a dynamic loader it is the first word that is not the loader's."""
    names = [_basename(argv[0]) if argv else "", _basename(exe)]
    if any(map(_LOADER.fullmatch, names)):
        names = [_basename(word) for word in _after_loader(argv)][:1]
    return next((name for name in names if argv and _PROGRAM.fullmatch(name)), "")


def _after_loader(argv: Sequence[str]) -> Sequence[str]:
    first = 1
    while first < len(argv) and argv[first].startswith("--"):
        takes_value = "=" not in argv[first] and argv[first] not in ("--inhibit-cache", "--list", "--verify")
        first += 2 if takes_value else 1
    return argv[first:]


def _basename(path: str) -> str:
    # An executable that was upgraded under a running QEMU.
    return os.path.basename(path.removesuffix(" (deleted)"))


def _options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options that concern us, one dash or two; ``--option=value`` is the storage daemon's."""
    words = iter(argv)
    for word in words:
        if word.startswith("-"):
            option, equals, value = word.removeprefix("-").removeprefix("-").partition("=")
            if option in ("name", "qmp", "qmp-pretty", "mon", "monitor", "chardev", "drive", "blockdev", *_DISKS):
                yield option, value if equals else next(words, "")


def _keys(text: str, implied: str) -> dict[str, str]:
    """``key=value,flag,...`` as QEMU reads it: a comma in a value is doubled, the first key may be left out."""
    if text.startswith("{"):
        return _json_keys(text)
    keys: dict[str, str] = {}
    for number, item in enumerate(re.findall(r"(?:[^,]|,,)+", text)):
        key, equals, value = item.partition("=")
        if not equals:
            key, value = (implied, item) if number == 0 else (item, "on")
        keys[key] = value.replace(",,", ",")
    return keys


def _decoded(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_keys(text: str) -> dict[str, str]:
    value = _decoded(text)
    return {key: item for key, item in value.items() if isinstance(item, str)} if isinstance(value, dict) else {}


def _qmp_sockets(
    options: Iterable[tuple[str, str]], chardevs: Mapping[str, Mapping[str, str]], *, daemon: bool
) -> Iterator[Mapping[str, str]]:
    """The chardevs behind the QMP monitors. A bare ``-mon`` is a human monitor, except in the storage daemon."""
    for option, text in options:
        if option in ("qmp", "qmp-pretty"):
            yield chardevs.get(text[8:], {}) if text.startswith("chardev:") else _legacy(text)
        elif option == ("monitor" if daemon else "mon"):
            keys = _keys(text, "chardev")
            if keys.get("mode", "control" if daemon else "readline") == "control":
                yield chardevs.get(keys.get("chardev", ""), {})


def _legacy(text: str) -> Mapping[str, str]:
    """``unix:PATH,...`` and ``tcp:HOST:PORT,...``, as the chardev that QEMU makes of it."""
    kind, _, rest = text.partition(":")
    if kind == "unix":
        return {**_keys(rest, "path"), "backend": "socket"}
    if kind == "tcp":
        keys = _keys(rest, "address")
        host, _, port = keys.get("address", "").rpartition(":")
        return {**keys, "backend": "socket", "host": host.strip("[]"), "port": port}
    return {}


def _address(keys: Mapping[str, str], cwd: str | None) -> str | None:
    """Where a client connects; None for all that is no plain listening socket."""
    if keys.get("backend") != "socket" or not _is_on(keys.get("server", "off")):
        return None
    if any(_is_on(keys.get(key, "off")) for key in _NOT_PLAIN):
        return None
    path = keys.get("path", "")
    if path:
        absolute = os.path.join(cwd or "", path.removeprefix("./"))
        return absolute if absolute.startswith("/") else None
    if "fd" in keys:
        return f"fd:{keys['fd']}"
    return tcp(keys.get("host", ""), keys.get("port", ""))


def tcp(host: str, port: str) -> str | None:
    """``tcp:HOST:PORT``, None for no usable port; who listens on every address is reached on the loopback."""
    if not re.fullmatch(r"[1-9][0-9]{0,4}", port):
        return None
    host = _LOOPBACK.get(host, host)
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


def _is_on(value: str) -> bool:
    return value not in ("off", "no", "false", "n")
