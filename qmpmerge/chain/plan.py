"""
What a merge or a pull will do, as a value. Pure: nothing here asks QEMU or opens a file.

A plan says which images go, which one is rewritten to what, and which chain must be there afterwards. `--dry-run` prints it,
and after the job a fresh discovery must equal its `result`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from qmpmerge.chain import backing
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.chain.layer import LayerName
from qmpmerge.errors import BackingString, BaseAboveTop, BaseIsTop, OptionsConflict, Refused, ShorterLayer
from qmpmerge.value import Value

Direction = Literal["commit", "pull"]
"""Where the data of the images goes that leave a chain: into the image below them, or into the one above."""


class Plan(Value, ABC):
    """
    Images leave a chain, and what they hold goes into a neighbour of theirs: the `receiver`.

    `merged` are those that leave, lowest first, and `top` is the highest of them. `base` lies right below them, None where
    nothing does, and `overlay` right above, None where the active image leaves. The overlay's header gets the string
    `backing_name`, None for no backing file. `result` is the chain afterwards. A plan with `refusals` (ShorterLayer,
    BackingString) must not be carried out: `checks.check` raises them together with what else it finds. `base_is_named` says
    that the user has named the base, and not left it to us.
    """

    direction: ClassVar[Direction]
    chain: Chain
    base: Image | None
    top: Image
    merged: tuple[Image, ...]
    overlay: Image | None
    backing_name: str | None
    result: Chain
    refusals: tuple[Refused, ...] = ()
    base_is_named: bool = False

    @property
    @abstractmethod
    def receiver(self) -> Image:
        """The image that the data is written to."""

    @property
    @abstractmethod
    def written(self) -> tuple[Image, ...]:
        """The images that are written to, the receiver first."""

    @property
    @abstractmethod
    def views(self) -> tuple[tuple[Image, ...], tuple[Image, ...]]:
        """
        Two ways through the images that must show the same before anything is switched, base first: with those that leave, and
        without.
        """

    @property
    @abstractmethod
    def changed(self) -> tuple[Image, ...]:
        """The images that show other data afterwards, or are in nobody's chain any more: what is built on one is ruined."""

    @property
    @abstractmethod
    def exclusive(self) -> tuple[Image, ...]:
        """The images that no other process may have open."""

    @property
    def named(self) -> tuple[Image, ...]:
        """The images that the next start must find under their names."""
        return tuple(image for image in (self.base, self.overlay) if image is not None)

    @property
    def touched(self) -> tuple[Image, ...]:
        """All images that play a part, base first."""
        return tuple(image for image in (self.base, *self.merged, self.overlay) if image is not None)

    @property
    def base_index(self) -> int:
        """The index of the base in the chain, 0 where there is none."""
        return 0 if self.base is None else self.chain.index(self.base)

    @property
    def pivots(self) -> bool:
        """Whether the active image leaves, and the guest moves onto base: nothing is rewritten then."""
        return self.overlay is None and bool(self.merged)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to merge."""
        return not self.merged


class CommitPlan(Plan):
    """Merge the images above `base` up to and including `top` into `base`."""

    direction = "commit"
    base: Image

    @property
    def receiver(self) -> Image:
        """Base."""
        return self.base

    @property
    def shines_through(self) -> bool:
        """Whether base has to be enlarged, and would show there what it is built on unless it notes zeros."""
        index, size = self.base_index, self.base.virtual_size
        return index > 1 and size < min(self.chain[index - 1].virtual_size, self.top.virtual_size)

    @property
    def written(self) -> tuple[Image, ...]:
        """Base, and the overlay for its header."""
        return self.named

    @property
    def views(self) -> tuple[tuple[Image, ...], tuple[Image, ...]]:
        """Through top, and through base."""
        images = self.chain.images
        return images[: self.chain.index(self.top)], images[: self.base_index]

    @property
    def changed(self) -> tuple[Image, ...]:
        """Base shows what top did, and what was merged is stashed."""
        return (self.base, *self.merged)

    @property
    def exclusive(self) -> tuple[Image, ...]:
        """All."""
        return self.touched


class PullPlan(Plan):
    """Pull what the images below `overlay` hold, down to `base` and without it, into `overlay`: no image shows other data."""

    direction = "pull"
    overlay: Image

    @property
    def receiver(self) -> Image:
        """The overlay."""
        return self.overlay

    @property
    def written(self) -> tuple[Image, ...]:
        """The overlay, with its header."""
        return (self.overlay,)

    @property
    def views(self) -> tuple[tuple[Image, ...], tuple[Image, ...]]:
        """The overlay on all that lies below it, and on base alone."""
        images = self.chain.images
        return images[: self.chain.index(self.overlay)], (*images[: self.base_index], self.overlay)

    @property
    def changed(self) -> tuple[Image, ...]:
        """None."""
        return ()

    @property
    def exclusive(self) -> tuple[Image, ...]:
        """The overlay: all else is only read."""
        return (self.overlay,)

    @property
    def is_in_the_middle(self) -> bool:
        """Whether it is pulled into another image than the active one, which QEMU has to open for writing."""
        return self.overlay is not self.chain.active


def commit(
    chain: Chain,
    *,
    disk: str = "",
    base: LayerName | None = None,
    top: LayerName | None = None,
    shallow: bool = False,
) -> CommitPlan:
    """
    Plan the merge of `top` (default: the active image) down into `base` (default: the lowest image).

    `shallow` merges top into the image right below it. Layers are addressed as `Chain.find` takes them.
    Raises NoSuchLayer, AmbiguousLayer, BaseAboveTop, BaseIsTop, OptionsConflict.
    """
    _refuse_both(shallow, base)
    top_index = len(chain) if top is None else chain.index(chain.find(top, disk))
    lowest = max(1, top_index - 1) if shallow else 1
    base_index = lowest if base is None else chain.index(chain.find(base, disk))
    if base_index > top_index:
        raise BaseAboveTop(base=chain[base_index].file, top=chain[top_index].file)
    if base_index == top_index and len(chain) > 1:
        raise BaseIsTop(base=chain[base_index].file, is_lowest=base_index == 1)
    return replace(_commit(chain, base_index, top_index), base_is_named=base is not None)


def pull(
    chain: Chain,
    *,
    disk: str = "",
    base: LayerName | None = None,
    top: LayerName | None = None,
    shallow: bool = False,
) -> PullPlan:
    """
    Plan to pull what lies below `top` (default: the active image), and above `base` (default: all of it), into `top`.

    `shallow` pulls the image right below top only. Raises as `commit`.
    """
    _refuse_both(shallow, base)
    into = len(chain) if top is None else chain.index(chain.find(top, disk))
    lowest = max(0, into - 2) if shallow else 0
    base_index = lowest if base is None else chain.index(chain.find(base, disk))
    if base_index > into:
        raise BaseAboveTop(base=chain[base_index].file, top=chain[into].file, pulls=True)
    if base_index == into and len(chain) > 1:
        raise BaseIsTop(base=chain[base_index].file, is_lowest=base_index == 1, pulls=True)
    return replace(_pull(chain, min(base_index, into - 1), into), base_is_named=base is not None)


def keeping(direction: Direction, chain: Chain, keep: int, *, disk: str = "", base: LayerName | None = None) -> Plan:
    """
    Plan what leaves the newest `keep` overlays above `base` (default: the lowest image), and is empty where there are no more.
    What none stays to be pulled into is committed. Raises NoSuchLayer, AmbiguousLayer.
    """
    base_index = 1 if base is None else chain.index(chain.find(base, disk))
    top_index = max(base_index, len(chain) - keep)
    way = direction if base_index < top_index < len(chain) else "commit"
    return replace(between(way, chain, base_index, top_index), base_is_named=base is not None)


def planned(
    direction: Direction, chain: Chain, *, disk: str = "", base: LayerName | None, top: LayerName | None, shallow: bool
) -> Plan:
    """What is asked for in these words: `commit` or `pull`."""
    make = commit if direction == "commit" else pull
    return make(chain, disk=disk, base=base, top=top, shallow=shallow)


def between(direction: Direction, chain: Chain, base: int, top: int) -> Plan:
    """The plan by which the images above index `base`, up to `top`, leave the chain. Raises IndexError."""
    return _commit(chain, base, top) if direction == "commit" else _pull(chain, base, top + 1)


def _refuse_both(shallow: bool, base: LayerName | None) -> None:
    if shallow and base is not None:
        raise OptionsConflict(options=["--shallow", "--base"])


def _commit(chain: Chain, base_index: int, top_index: int) -> CommitPlan:
    base, merged = chain[base_index], chain.images[base_index:top_index]
    linked, refusals = _linked(chain, base_index, top_index)
    return CommitPlan(
        chain=chain,
        base=base,
        top=chain[top_index],
        merged=merged,
        overlay=chain[top_index + 1] if linked else None,
        backing_name=linked[0].backing if linked else None,
        result=Chain((*chain.images[:base_index], *linked)),
        refusals=(*_shorter(merged, base.virtual_size, base), *refusals),
    )


def _pull(chain: Chain, base_index: int, into: int) -> PullPlan:
    base, merged = chain[base_index] if base_index else None, chain.images[base_index : into - 1]
    overlay, refusals = chain[into], list[Refused]()
    linked: Sequence[Image] = chain.images[into - 1 :]
    if merged:
        linked, refusals = _linked(chain, base_index, into - 1)
    if base is not None:
        refusals = [*_shorter(merged, min(base.virtual_size, overlay.virtual_size), base, pulls=True), *refusals]
    return PullPlan(
        chain=chain,
        base=base,
        top=merged[-1] if merged else overlay,
        merged=merged,
        overlay=overlay,
        backing_name=linked[0].backing,
        result=Chain((*chain.images[:base_index], *linked)),
        refusals=tuple(refusals),
    )


def _linked(chain: Chain, base_index: int, top_index: int) -> tuple[tuple[Image, ...], list[Refused]]:
    """The images above `top_index`, the lowest of them linked to that at `base_index` (0 for none), and why it cannot be."""
    above = chain.images[top_index:]
    if not above:
        return (), []
    if not base_index:
        return (replace(above[0], backing=None, backing_format=None), *above[1:]), []
    base, name, refusals = chain[base_index], None, list[Refused]()
    try:
        name = backing.backing_name(above[0], base, chain[base_index + 1])
    except BackingString as refusal:
        refusals.append(refusal)
    return (replace(above[0], backing=name, backing_format=base.format), *above[1:]), refusals


def _shorter(merged: Sequence[Image], size: int, base: Image, *, pulls: bool = False) -> Iterator[ShorterLayer]:
    """Those behind whose ends zeros are read now, and base would be read afterwards: up to `size` it would show."""
    more = {"instead": "pull the whole chain (no `--base`)"} if pulls else {}
    for image in merged:
        if image.virtual_size < size:
            yield ShorterLayer(
                image=image.file, size=image.virtual_size, base=base.file, base_size=base.virtual_size, **more
            )
