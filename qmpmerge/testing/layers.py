"""Chains of images, of any layout, each layer with data of its own."""

import functools
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qmpmerge.testing.content import MIB, SIZE, Content, Run
from qmpmerge.testing.programs import escaped, run
from qmpmerge.testing.stored import Stored

PAGE = 4096


@dataclass(frozen=True)
class Layer:
    """
    An image to be made. Its `name`, relative to the chain's folder, ends with its format, ``.raw`` or ``.qcow2``.

    `size` in bytes is that of the layer below where it is not given, `cluster_size` QEMU's own choice. The name of the layer
    below is written relative to this one's folder, or whole where it is `absolute`. With `data_file` the guest's data is in a
    raw file of its own, ``NAME.data``. `options` are more of ``qemu-img create -o``. `writes` (pattern, offset, length) are
    made into this layer; None is one pattern over a part of what the layer below has, and one where it has nothing.
    """

    name: str
    size: int | None = None
    cluster_size: int | None = None
    absolute: bool = False
    data_file: bool = False
    options: tuple[str, ...] = ()
    writes: tuple[Run, ...] | None = None

    @property
    def format(self) -> str:
        """As its name ends, that of a stashed image (``NAME.merged``) too."""
        return form(self.name)


def form(image: Path | str) -> str:
    """The format, which the names of our images end with, those of stashed images too."""
    return os.path.basename(image).removesuffix(".merged").rpartition(".")[2]


class Layers(Sequence[Path]):
    """The images of a chain, base first, and in `content` what a guest must see through the last."""

    def __init__(self, images: Sequence[Path], content: Content) -> None:
        self.images = list(images)
        self.content = content

    def __getitem__(self, index: int) -> Path:  # type: ignore[override]  # nobody slices a chain
        return self.images[index]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def base(self) -> Path:
        """The lowest."""
        return self.images[0]

    @property
    def active(self) -> Path:
        """The one that a VM is started from."""
        return self.images[-1]

    def check(self, image: Path | None = None) -> None:
        """
        See that an image, the active one if none is named, shows the content, as `Content.check` does. While a VM runs there is
        `Vm.check`.
        """
        image = image or self.active
        try:
            self.content.check(image, form(image))
        except AssertionError as error:
            if " lock" in str(error):
                error.add_note("a VM has it open: stop the VM first, or see what its guest reads, by vm.check()")
            raise


class MakeChain:
    """Makes chains in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = 0

    def __call__(
        self,
        *layers: str | Layer,
        folder: Path | None = None,
        size: int = SIZE,
        cluster_size: int | None = None,
        absolute: bool = False,
        fill: bool = True,
    ) -> Layers:
        """
        A chain of these layers, base first; a bare name is a `Layer` of this size, cluster size and kind of backing name. They
        lie in `folder`, or in the test's own, a second chain in ``chain2`` below it. With ``fill=False`` nothing is written.
        Raises ValueError where a name would lead out of both, since a file that is there is overwritten.
        """
        if not isinstance(size, int):
            raise TypeError(f"size is {size!r}, and not a number of bytes, as 64 * MIB is")
        self._made += 1
        place = self._folder / f"chain{self._made}" if self._made > 1 else self._folder

        chosen = [
            Layer(one, cluster_size=cluster_size, absolute=absolute) if isinstance(one, str) else one
            for one in layers or ("base.raw", "top.qcow2")
        ]
        for layer in chosen:
            path = Path(os.path.normpath((folder or place) / layer.name))
            if not any(path.is_relative_to(one) for one in (self._folder, folder or place)):
                raise ValueError(f"{layer.name} is not within {folder or self._folder}")
        return create(folder or place, chosen, size=size, fill=fill)


def create(folder: Path, layers: Sequence[Layer], *, size: int = SIZE, fill: bool = True) -> Layers:
    """Make a chain; `size` is that of the base where it has none. What was made once is put down again as it was."""
    folder = folder.absolute()
    below: Path | None = None
    images, writes, content = [], [], Content(size)
    for number, layer in enumerate(layers):
        content.resize(layer.size or content.size)
        image = folder / layer.name
        image.parent.mkdir(parents=True, exist_ok=True)
        _create(image, layer, content.size, below)
        images.append(image)
        writes.append(own_writes(number, content.size) if layer.writes is None else layer.writes)
        for run_ in writes[-1] if fill else ():
            content.put(*run_)
        below = image
    if fill:
        write(images, writes, stored=not any(layer.data_file for layer in layers))
    return Layers(images, content)


def own_writes(number: int, size: int = SIZE) -> tuple[Run, ...]:
    """What a layer holds where nothing else is asked for: a pattern that overlaps that of the layer below, and another one."""
    unit = min(MIB, size // 8 // PAGE * PAGE)
    assert unit, f"a disk of {size} bytes is too small for data of each layer"
    part = unit // 16 // PAGE * PAGE or PAGE
    place = number % 6
    return (
        (0x10 + number % 0x40, place * unit, unit + 2 * part),
        (0x20 + number % 0x40, 6 * unit + place * part, 3 * part),
    )


def write(images: Sequence[Path], writes: Sequence[tuple[Run, ...]], *, stored: bool = True) -> None:
    """
    Write into each image of a chain, base first. What this has made of such images once is put down again as it was, unless
    some of their data is elsewhere: then they are not `stored`.
    """
    stored = stored and sum(length for runs in writes for _, _, length in runs) <= LARGEST
    before = (tuple(map(Stored.of, images)), tuple(writes)) if stored else None
    if before is None or before not in _WRITTEN:
        for image, runs in zip(images, writes, strict=True):
            commands = [word for pattern, at, length in runs for word in ("-c", f"write -P {pattern} {at} {length}")]
            if commands:
                run("qemu-io", "-f", form(image), *commands, image)
        if before is None:
            return
        while len(_WRITTEN) >= KEPT:
            del _WRITTEN[next(iter(_WRITTEN))]
        _WRITTEN[before] = tuple(map(Stored.of, images))
    for image, filled in zip(images, _WRITTEN[before], strict=True):
        filled.put(image)


LARGEST, KEPT = 64 * MIB, 64
_WRITTEN: dict[tuple[tuple[Stored, ...], tuple[tuple[Run, ...], ...]], tuple[Stored, ...]] = {}
"""What `write` has made of images that were like this."""


def _create(image: Path, layer: Layer, size: int, below: Path | None) -> None:
    options = [*layer.options]
    options += [f"cluster_size={layer.cluster_size}"] if layer.cluster_size else []
    options += [f"data_file={escaped(image)}.data"] if layer.data_file else []
    words = ["-f", layer.format, *(("-o", ",".join(options)) if options else ())]
    if below is not None:
        name = str(below) if layer.absolute else os.path.relpath(below, image.parent)
        words += ["-u", "-b", name, "-F", form(below)]
    if layer.data_file:  # whose name QEMU takes as it is, from wherever it is started
        run("qemu-img", "create", "-q", *words, image, str(size))
    else:
        _created(shutil.which("qemu-img"), tuple(words), size).put(image)


@functools.lru_cache(maxsize=KEPT)
def _created(_program: str | None, words: tuple[str, ...], size: int) -> Stored:
    """An empty image as this qemu-img makes it."""
    with tempfile.TemporaryDirectory() as folder:
        run("qemu-img", "create", "-q", *words, "image", str(size), cwd=Path(folder))
        return Stored.of(Path(folder) / "image")
