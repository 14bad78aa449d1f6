"""
What a merge will do, as a value. Pure: nothing here asks QEMU or opens a file.

A `CommitPlan` says which images go, which one is rewritten to what, and which chain must be there afterwards. `--dry-run`
prints it, and after the job a fresh discovery must equal its `result`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qmpmerge.chain import backing
from qmpmerge.chain.chain import Chain, Image
from qmpmerge.chain.layer import LayerName
from qmpmerge.errors import BackingString, BaseAboveTop, BaseIsTop, OptionsConflict, Refused, ShorterLayer


@dataclass(frozen=True)
class CommitPlan:
    """
    Merge the images above `base` up to and including `top` into `base`.

    `merged` are the images that the chain loses, base first. `pivots` says that top is the active image: then the guest
    moves onto base and nothing is rewritten. Else `overlay` is the image right above top, and `backing_name` is the
    string its header will get. `result` is the chain afterwards. A plan with `refusals` (ShorterLayer, BackingString) must
    not be carried out: `checks.check` raises them together with what else it finds. `base_is_named` says that the user has
    named the base, and not left it to us.
    """

    chain: Chain
    base: Image
    top: Image
    merged: tuple[Image, ...]
    pivots: bool
    overlay: Image | None
    backing_name: str | None
    result: Chain
    refusals: tuple[Refused, ...] = ()
    base_is_named: bool = False

    @property
    def written(self) -> tuple[Image, ...]:
        """The images that are written: base, and the overlay whose header is."""
        return (self.base,) if self.overlay is None else (self.base, self.overlay)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to merge: the disk has a single image."""
        return not self.merged


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
    if shallow and base is not None:
        raise OptionsConflict(options=["--shallow", "--base"])
    top_index = len(chain) if top is None else chain.index(chain.find(top, disk))
    lowest = max(1, top_index - 1) if shallow else 1
    base_index = lowest if base is None else chain.index(chain.find(base, disk))
    if base_index > top_index:
        raise BaseAboveTop(base=chain[base_index].file, top=chain[top_index].file)
    if base_index == top_index and len(chain) > 1:
        raise BaseIsTop(base=chain[base_index].file)
    return replace(_plan(chain, base_index, top_index), base_is_named=base is not None)


def _plan(chain: Chain, base_index: int, top_index: int) -> CommitPlan:
    below, merged, above = (
        chain.images[:base_index],
        chain.images[base_index:top_index],
        chain.images[top_index:],
    )
    base = below[-1]
    refusals: list[Refused] = [*_shorter(merged, base)]
    overlay = above[0] if above else None
    name = None
    if overlay is not None:
        try:
            name = backing.backing_name(overlay, base, merged[0])
        except BackingString as refusal:
            refusals.append(refusal)
        rewritten = replace(overlay, backing=name, backing_format=base.format)
        above = (rewritten, *above[1:])
    return CommitPlan(
        chain=chain,
        base=base,
        top=chain[top_index],
        merged=merged,
        pivots=overlay is None and bool(merged),
        overlay=overlay,
        backing_name=name,
        result=Chain((*below, *above)),
        refusals=tuple(refusals),
    )


def _shorter(merged: Sequence[Image], base: Image) -> Iterator[ShorterLayer]:
    for image in merged:
        if image.virtual_size < base.virtual_size:
            yield ShorterLayer(image=image.file, size=image.virtual_size, base=base.file, base_size=base.virtual_size)
