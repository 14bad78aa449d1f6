"""Backing file names: the string in a header, the path it means, and where it leads."""

import json
import os

from qmpmerge.chain.chain import Image
from qmpmerge.errors import BackingString

HEADER_LIMIT = 1023
"""Bytes a qcow2 header has for the backing file name (docs/interop/qcow2.txt: backing_file_size)."""


def leads_to(image: Image, backing: str, target: Image) -> bool | None:
    """
    Whether the string `backing` in the header of `image` leads to `target`; None where it is not known.

    A relative name may lead there from the folder of the name that QEMU opened, or from the folder of the real file.
    """
    if not target.has_path:
        return True if backing == target.file else None
    if backing.startswith("json:"):
        return None
    if "://" in backing:
        return False
    return any(leads_from(folder, backing, target) for folder in folders(image))


def folders(image: Image) -> tuple[str, ...]:
    """The folders from which a relative name in the image's header may be resolved; two where it is a symlink."""
    return tuple(dict.fromkeys((os.path.dirname(image.file), os.path.dirname(os.path.realpath(image.file)))))


def leads_from(folder: str, backing: str, target: Image) -> bool:
    """Whether the path `backing`, resolved from `folder`, is `target`."""
    return target.is_file(os.path.join(folder, backing.removeprefix("file:")))


def backing_name(overlay: Image, base: Image, child: Image) -> str:
    """
    The string that leads from the overlay's header to `base`.

    Relative stays relative and absolute stays absolute. Where base has no path, or its present child names it by a
    protocol or a ``json:`` name, which may say more than the path does, that string is used again. Never left to QEMU,
    which would write an absolute path or even a json: name over a relative one. Raises BackingString where qcow2 has no
    room for it, or the child names a file for what QEMU has from elsewhere: the next start would take that file. An
    overlay that has no path either is never opened by what its header says.
    """
    if not base.has_path:
        name = child.backing or base.file
        if is_path(name) and overlay.has_path:
            raise BackingString(overlay=overlay.file, backing=name, reason=f"QEMU uses {base.file}, which is no path")
    elif child.backing and not is_path(child.backing):
        name = child.backing
    elif overlay.has_path and is_relative(overlay.backing):
        name = _relative(base.file, os.path.dirname(overlay.file))
    else:
        name = base.file
    length = len(os.fsencode(name))
    if length > HEADER_LIMIT:
        raise BackingString(
            overlay=overlay.file,
            backing=name,
            reason=f"{length} bytes, the header has room for {HEADER_LIMIT}",
        )
    return name


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


def named_path(name: str) -> str | None:
    """The path in a header's name, ``json:`` forms of a local file included; None for all that is no local file."""
    if name.startswith("json:"):
        try:
            options = json.loads(name.removeprefix("json:"))
        except (ValueError, RecursionError):
            return None
        while isinstance(options, dict) and "filename" not in options:
            options = options.get("file")
        name = options["filename"] if isinstance(options, dict) and isinstance(options["filename"], str) else ":"
    name = name.removeprefix("file:")
    return None if ":" in name.split("/", 1)[0] else name
