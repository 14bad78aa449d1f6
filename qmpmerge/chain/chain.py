"""
Images and chains: plain values, base first.

A chain is written as users draw it, ``base.raw <-- a.qcow2 <-- b.qcow2``. Index 1 is the base and the active image has
the highest index, so ``vda[1]`` is the base whatever is stacked on it.
"""

import os
from collections.abc import Iterator, Sequence

from qmpmerge.chain.layer import LayerName, find
from qmpmerge.value import Value

Inode = tuple[int, int]
"""(st_dev, st_ino): which file it is, whatever it is called."""

ELSEWHERE = "qemu:"
"""What stands before QEMU's own name for a file that no path of ours is known to lead to; no protocol of QEMU's."""


class Slice(Value):
    """
    A part of a file that an image is in: `size` bytes from the byte `offset` on, without a size all that follows.

    An `offset` of None says that the image is in a part of the file, and nobody tells in which.
    """

    offset: int | None
    size: int | None = None

    def __str__(self) -> str:
        if self.offset is None:
            return "a part of it"
        return f"{self.size} bytes from {self.offset} on" if self.size is not None else f"from byte {self.offset} on"


class Image(Value):
    """
    One image of a chain.

    `file` is an absolute path as QEMU opened it, or a URI where there is no path, or what `is_elsewhere` says; sizes are
    bytes. `slice` is the part of that file which is this image, None where it is the whole of it: the rest of the file is
    somebody else's. `data` is the external data file of a qcow2 image (`data_file`), as QEMU has it open. `backing` and
    `backing_format` are the strings written in the image's own header. `allocated` is what the image takes on its storage,
    metadata included (`actual-size` in QEMU's words). What is not known is None. With `is_renamed` the name by which QEMU
    opened it leads to another image of the chain by now, and its own file is not known by name.
    """

    file: str
    format: str
    virtual_size: int
    node: str | None = None
    backing: str | None = None
    backing_format: str | None = None
    allocated: int | None = None
    inode: Inode | None = None
    read_only: bool = False
    slice: Slice | None = None
    data: "Image | None" = None
    is_renamed: bool = False

    @property
    def identity(self) -> object:
        """Which image it is, whatever its file is called; by its node where its file, or its place there, is not known."""
        unknown = self.is_renamed or (self.slice is not None and self.slice.offset is None)
        return self.inode or self.file, self.slice, self.node if unknown else None

    @property
    def label(self) -> str:
        """The file, and which part of it, for sentences."""
        return self.file if self.slice is None else f"{self.file} ({self.slice})"

    @property
    def name(self) -> str:
        """The last part of the path; the whole URI where there is no path."""
        return os.path.basename(self.file) if self.has_path else self.file

    @property
    def has_path(self) -> bool:
        """Whether `file` is a path on this host."""
        return self.file.startswith("/")

    @property
    def is_elsewhere(self) -> bool:
        """
        Whether it is a file, and where is not known to us: ``qemu:NAME`` is then what QEMU calls it. Nothing of ours may look
        at, rename or write a file of that name.
        """
        return self.file.startswith(ELSEWHERE)

    def is_file(self, path: str) -> bool:
        """Whether `path` leads to the file of this image; symlinks are followed on both sides."""
        if self.is_renamed or "\0" in path:
            return False
        if not self.has_path:
            return path == self.file
        if self.inode is not None:
            try:
                status = os.stat(path)
            except OSError:
                return False
            return (status.st_dev, status.st_ino) == self.inode
        return os.path.realpath(path) == os.path.realpath(self.file)

    def same_as(self, other: "Image") -> bool:
        """
        Whether both are known to be one image: by inode, and by name only where neither has one (a network's); and the same
        part of the file.
        """
        if self.inode or other.inode:
            return self.identity == other.identity
        return (self.file, self.slice) == (other.file, other.slice)

    def may_be(self, other: "Image") -> bool:
        """Whether both can be one image: where it is not known which file one of them is, their names say."""
        if self.inode and other.inode:
            return self.identity == other.identity
        return (self.file, self.slice) == (other.file, other.slice)


class Chain(Value):
    """The images of one disk, base first. Not empty, no image twice."""

    images: tuple[Image, ...]

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("a chain has at least one image")
        identities = [image.identity for image in self.images]
        if len(set(identities)) != len(identities):
            raise ValueError(f"an image stands twice in the chain {self}")

    @property
    def base(self) -> Image:
        """The lowest image."""
        return self.images[0]

    @property
    def active(self) -> Image:
        """The image the guest writes to."""
        return self.images[-1]

    @property
    def files(self) -> list[str]:
        """The files, base first; one that has several of the images in it stands there as often."""
        return [image.file for image in self.images]

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Image]:
        return iter(self.images)

    def __getitem__(self, index: int) -> Image:
        """The image of this index, from 1 (the base) up."""
        if not 1 <= index <= len(self.images):
            raise IndexError(index)
        return self.images[index - 1]

    def index(self, image: Image) -> int:
        """The index of an image of this chain, from 1."""
        return self.images.index(image) + 1

    def find(self, layer: LayerName, disk: str = "") -> Image:
        """
        The image that a user means by `layer`: a word, an index from 1 (negative from the active image down) or a path.

        Raises NoSuchLayer, AmbiguousLayer.
        """
        return find(self, layer, disk)

    def same_files(self, other: "Chain") -> bool:
        """Whether both chains are made of the same files in the same order."""
        return len(self) == len(other) and all(map(Image.same_as, self.images, other.images))

    def __str__(self) -> str:
        return draw(self.images)


def told_apart(one: Chain, other: Chain) -> tuple[str, str]:
    """Both in full, with the backing strings; an image that has one name in both, and is not one file, with its inode."""
    both = [
        {image.file for image in chain if not any(image.same_as(its) for its in against)}
        for chain, against in ((one, other), (other, one))
    ]
    doubtful = both[0] & both[1]
    return _in_full(one, doubtful), _in_full(other, doubtful)


def _in_full(chain: Chain, doubtful: set[str]) -> str:
    names = [f"{image.file} ({_which(image)})" if image.file in doubtful else image.file for image in chain]
    backings = [f" (backing {image.backing})" if image.backing else "" for image in chain]
    return " <-- ".join(map("".join, zip(names, backings, strict=True)))


def _which(image: Image) -> str:
    return "inode {1} on device {0}".format(*image.inode) if image.inode else "which file is not known"


def draw(images: Sequence[Image]) -> str:
    """``base.raw <-- a.qcow2``; whole paths where a last part alone would stand twice."""
    names = [image.name for image in images]
    unique = len(set(names)) == len(names)
    return " <-- ".join(names if unique else [image.label for image in images])
