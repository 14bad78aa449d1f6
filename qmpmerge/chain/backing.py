"""Backing file names: the string in a header, the path it means, and where it leads."""

import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping

from qmpmerge.chain.chain import Image, Slice
from qmpmerge.errors import BackingString
from qmpmerge.value import Value

HEADER_LIMIT = 1023
"""Bytes a qcow2 header has for the backing file name (docs/interop/qcow2.txt: backing_file_size)."""


def leads_to(image: Image, backing: str, target: Image) -> bool | None:
    """
    Whether the string `backing` in the header of `image` leads to `target`; None where it is not known.

    A relative name may lead there from the folder of the name that QEMU opened, or from the folder of the real file.
    """
    if target.is_renamed:
        return None
    if not target.has_path:
        return True if backing == target.file else None
    if backing.startswith("json:"):
        return _options_lead_to(backing, target)
    if "://" in backing:
        return False
    if not any(leads_from(folder, backing, target) for folder in folders(image)):
        return False
    return True if target.slice is None else None  # whoever starts from the name alone sees the whole file


def _options_lead_to(backing: str, target: Image) -> bool | None:
    """The same for a ``json:`` name; a relative path in it is QEMU's business, which resolves it from its own folder."""
    named = described(backing)
    if named is None or not named.path.startswith("/"):
        return None
    if not target.is_file(named.path):
        return False
    whole = Slice(0, target.virtual_size)
    if (named.slice or whole) == (target.slice or whole):
        return True
    may_be_all = target.slice is None and named.slice is not None and named.slice.offset == 0
    return None if may_be_all else False


def folders(image: Image) -> tuple[str, ...]:
    """The folders from which a relative name in the image's header may be resolved; two where it is a symlink."""
    return tuple(dict.fromkeys((os.path.dirname(image.file), os.path.dirname(os.path.realpath(image.file)))))


def leads_from(folder: str, backing: str, target: Image) -> bool:
    """Whether the path `backing`, resolved from `folder`, is `target` or its name, whatever lies there by now."""
    path = os.path.join(folder, backing.removeprefix("file:"))
    return target.is_file(path) or os.path.realpath(path) == os.path.realpath(target.file)


def backing_name(overlay: Image, base: Image, child: Image) -> str:
    """
    The string that leads from the overlay's header to `base`.

    Relative stays relative and absolute stays absolute. Where base has no path, or its present child names it by a
    protocol or a ``json:`` name, which may say more than the path does, that string is used again; a part of a file that
    the child does not name so gets a ``json:`` name. Never left to QEMU, which would write an absolute path or even a json:
    name over a relative one. Raises BackingString where qcow2 has no room for it, or the child names a file for what QEMU
    has from elsewhere: the next start would take that file. An overlay that has no path either is never opened by what its
    header says.
    """
    if not base.has_path:
        name = child.backing or base.file
        is_known = not (base.is_elsewhere or overlay.is_elsewhere) or _leads_alike(child, overlay, name)
        if (is_path(name) and overlay.has_path) or not is_known:
            raise BackingString(overlay=overlay.file, backing=name, reason=f"QEMU uses {base.file}, which is no path")
    elif child.backing and not is_path(child.backing):
        name = child.backing
    elif base.slice is not None:
        name = json_name(base, overlay.file)
    elif overlay.has_path and is_relative(overlay.backing):
        name = _relative(base.file, os.path.dirname(overlay.file))
    else:
        name = base.file
    length = len(os.fsencode(name))
    if not length:  # to QEMU that is no backing file at all
        raise BackingString(overlay=overlay.file, backing="''", reason="the base has no name")
    if length > HEADER_LIMIT:
        raise BackingString(
            overlay=overlay.file,
            backing=name,
            reason=f"{length} bytes, the header has room for {HEADER_LIMIT}",
        )
    return name


def _leads_alike(child: Image, overlay: Image, name: str) -> bool:
    """Whether a name means the same in both headers, of images of which we know QEMU's names at the most."""
    return name.startswith("/") or (
        name == child.backing and os.path.dirname(child.file) == os.path.dirname(overlay.file)
    )


def is_path(backing: str) -> bool:
    """Whether a header's string is a path; ``a:b`` would be read as a protocol name, which ``file:`` is too."""
    return backing.startswith("file:") or ":" not in backing.split("/", 1)[0]


def is_relative(backing: str | None) -> bool:
    """Whether a header's string is a path relative to its image; ``a:b`` would be read as a protocol name."""
    if not backing or backing.startswith("/"):
        return False
    return ":" not in backing.split("/", 1)[0]


def _relative(path: str, folder: str) -> str:
    name = os.path.relpath(path, folder)
    return name if is_relative(name) else f"./{name}"


def json_name(image: Image, overlay: str) -> str:
    """The ``json:`` name of an image that is a part of a file. Raises BackingString where nobody tells which part."""
    try:
        return "json:" + json.dumps(node(image, storage(image.file)))
    except OSError as error:
        raise BackingString(overlay=overlay, backing=image.file, reason=str(error.strerror)) from None


def node(image: Image, file: Mapping[str, object]) -> dict[str, object]:
    """The blockdev of an image in the blockdev `file`, or in a part of that. Raises OSError where it is not known in which."""
    if image.is_renamed:
        raise OSError(errno.ENOENT, "its name leads to another image now")
    if image.slice is None:
        return {"driver": image.format, "file": file}
    within = part(image.slice, file)
    return within if image.format == "raw" else {"driver": image.format, "file": within}


def part(slice: Slice, file: Mapping[str, object] | str) -> dict[str, object]:
    """The blockdev of this part of the blockdev `file`, or of its name. Raises OSError where nobody tells which part it is."""
    if slice.offset is None:
        raise OSError(errno.EINVAL, "QEMU uses a part of it, and does not tell which")
    size = {} if slice.size is None else {"size": slice.size}
    return {"driver": "raw", "offset": slice.offset, **size, "file": file}


def storage(path: str) -> dict[str, object]:
    """The node that opens a file or a block device of this host."""
    try:
        is_device = stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        is_device = False
    return {"driver": "host_device" if is_device else "file", "filename": path}


def slice_of(options: Mapping[str, object]) -> Slice:
    """The part that a ``raw`` node with these options shows. Raises ValueError for what is no number of bytes."""
    return Slice(_bytes(options.get("offset", 0)), _bytes(options["size"]) if "size" in options else None)


_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def _bytes(value: object) -> int:
    """A number as QEMU takes it, ``4M`` of a command line included. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,18})([kmgt]?)", str(value), re.IGNORECASE | re.ASCII)
    number = int(match[1]) * _UNITS[match[2].lower()] if match is not None else -1
    if not 0 <= number < 1 << 63:
        raise ValueError(value)
    return number


class Described(Value):
    """What a ``json:`` name says, where that is all: an image of this format in a local file, or in a part of one."""

    path: str
    format: str
    slice: Slice | None = None


def described(name: str) -> Described | None:
    """Read a ``json:`` name, as `node` would have it; None for one that says anything else, or more."""
    try:
        image = json.loads(name.removeprefix("json:"))
        is_raw = image["driver"] == "raw" and bool(image.keys() & {"offset", "size"})
        raw = image if is_raw else image["file"]
        file = raw["file"] if raw["driver"] == "raw" else raw
        allowed = {"driver", "offset", "size", "file"} if raw is not file else file.keys()
        if raw.keys() - allowed or (raw is not image and image.keys() != {"driver", "file"}):
            return None
        if file.keys() != {"driver", "filename"} or file["driver"] not in ("file", "host_device"):
            return None
        if not _may_be_a_path(file["filename"]):
            return None
        found = slice_of(raw) if raw is not file and raw.keys() & {"offset", "size"} else None
        return Described(file["filename"], str(image["driver"]), found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


_WRAPPED = r"(?s)(?:file|host_device|host_cdrom|blkdebug:[^:]*):(.*)"
_VERIFIED = r"(?s)blkverify:([^:]*):(.*)"
_NO_FILE = r"[a-z0-9+]+://|(?:fat|iscsi|nbd|nvme|rbd|sheepdog|ssh):|null-(?:co|aio):"
"""Names of what is no image file of this host."""

_ELSEWHERE = frozenset(
    [
        "ftp",
        "ftps",
        "gluster",
        "http",
        "https",
        "iscsi",
        "nbd",
        "nfs",
        "null-aio",
        "null-co",
        "nvme",
        "rbd",
        "ssh",
        "vvfat",
    ]
)
"""The drivers whose options say where that is, without a file's name."""

_FILE_KEYS = "filename", "file", "x-image", "x-raw"
"""
The options whose strings name a file; `file` names a node, which no header can know of. Those with an x are what `blkdebug:`
and `blkverify:` become.
"""


def named_path(name: str) -> str | None:
    """
    The path in a header's name, ``json:`` forms of a local file included; None for all that is no local file, or can be none.
    """
    paths = named_paths(name)
    return paths[0] if paths else None


def named_paths(name: str) -> tuple[str, ...]:
    """All such paths: a ``json:`` name can lead to several files, the first is that of the image itself."""
    paths = [path for path in _named(name) if ":" not in path.split("/", 1)[0] and _may_be_a_path(path)]
    return tuple(dict.fromkeys(paths))


def is_riddle(name: str) -> bool:
    """Whether a header's name may lead to a file of this host and we cannot tell to which: QEMU knows more forms than we."""
    if named_paths(name) or not _may_be_a_path(name):
        return False
    if not name.startswith("json:"):
        return not is_path(name) and re.match(_NO_FILE, name) is None
    options = _options(name)
    if options is None:
        return True
    told = [value for key, value in options if _is(key, *_FILE_KEYS)]
    drivers = {value for key, value in options if _is(key, "driver")}
    return any(map(is_riddle, told)) if told else not drivers & _ELSEWHERE


def _named(name: str) -> Iterator[str]:
    """What a name leads to, QEMU's prefixes for files of this host taken off."""
    if name.startswith("json:"):
        for key, value in _options(name) or ():
            if _is(key, *_FILE_KEYS):
                yield from _named(value)
    elif (verified := re.fullmatch(_VERIFIED, name)) is not None:
        yield from _named(verified[1])
        yield from _named(verified[2])
    elif (wrapped := re.fullmatch(_WRAPPED, name)) is not None:
        yield from _named(wrapped[1])
    else:
        yield name


def _is(key: str, *names: str) -> bool:
    """Whether a whole key ends with one of these."""
    return key.rpartition(".")[2] in names


def _options(name: str) -> list[tuple[str, str]] | None:
    """
    The options of a ``json:`` name that are strings, each by its whole key: ``{"file": {"filename": ...}}`` is the same to
    QEMU as ``{"file.filename": ...}``. Those of a backing file come last. None where it makes no sense to us.
    """
    try:
        options = json.loads(name.removeprefix("json:"))
        return sorted(_flat("", options), key=lambda option: "backing" in option[0].split("."))
    except (ValueError, RecursionError):
        return None


def _flat(key: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(f"{key}.{name}" if key else str(name), inner)


def _may_be_a_path(name: str) -> bool:
    """Whether a file can be called so: JSON can say what no system call takes."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False
