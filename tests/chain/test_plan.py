"""What a merge will do: checked against a model that shares no code with the plan."""

import os
import posixpath
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpmerge.chain import plan
from qmpmerge.chain.backing import HEADER_LIMIT, backing_name
from qmpmerge.chain.chain import Chain, Image, Slice
from qmpmerge.chain.plan import CommitPlan, Direction
from qmpmerge.errors import BackingString, BaseAboveTop, BaseIsTop, NoSuchLayer, OptionsConflict, ShorterLayer

MIB = 1024**2


def image(file: str, backing: str | None = None, size: int = 8 * MIB, format: str = "qcow2") -> Image:
    return Image(file, format, size, backing=backing, backing_format="qcow2" if backing else None)


def linear(count: int, size: int = 8 * MIB) -> Chain:
    """``/vm/1 <-- /vm/2 <-- ...`` with relative names."""
    return Chain(tuple(image(f"/vm/{n}", str(n - 1) if n > 1 else None, size) for n in range(1, count + 1)))


@dataclass(frozen=True)
class Asked:
    """A chain, and a range of it as the user asks for it and as indexes."""

    chain: Chain
    base: str | None
    top: str | None
    base_index: int
    top_index: int

    def planned(self) -> CommitPlan:
        return plan.commit(self.chain, disk="vda", base=self.base, top=self.top)


folders = st.sampled_from(["/", "/vm", "/vm/old", "/a b/x:y", "/ü"])
names = st.sampled_from(["", ".raw", "a:b.qcow2", ":", "file:x", "json:{}", " -x"])


@st.composite
def chains(draw: st.DrawFn, low: int = 1, grown: bool = True) -> Chain:
    """A chain of up to 12 images: any formats and sizes; names relative, absolute, odd, and without a path."""
    layer = st.tuples(folders, names, st.integers(1, 4), st.booleans())
    drawn = draw(st.lists(layer, min_size=low, max_size=12))
    sizes = [size for _, _, size, _ in drawn]
    images: list[Image] = []
    for number, (folder, name, size, flag) in enumerate(drawn):
        below = images[-1] if images else None
        file = f"nbd://host/{number}" if below is None and flag else posixpath.join(folder, f"{number}{name}")
        backing = below.file if below else None
        if below and below.file.startswith("/") and flag:
            backing = f"./{posixpath.relpath(below.file, folder)}"
        form = "qcow2" if below else draw(st.sampled_from(["qcow2", "raw", "qed", "vmdk"]))
        size = sorted(sizes)[number] if grown else size
        images.append(Image(file, form, size * MIB, f"node{number}", backing, below.format if below else None))
    return Chain(tuple(images))


@st.composite
def ranges(draw: st.DrawFn, *, above: int = 0, upward: bool = False, grown: bool = True) -> Asked:
    """
    A range to merge, its layers named in any of the ways there are, or left out where that says the same.

    `above` images at least stay above the top; `upward` is a base that is the top or lies above it.
    """
    chain = draw(chains(low=2 + above, grown=grown))
    top = draw(st.integers(1 if upward else 2, len(chain) - above))
    base = draw(st.integers(top, len(chain)) if upward else st.integers(1, top - 1))

    def layer(index: int, default: int) -> str | None:
        ways = [f"[{index}]", f"vda[{index}]", chain[index].file, chain[index].node]
        return draw(st.sampled_from([*ways, None] if index == default else ways))

    return Asked(chain, layer(base, 1), layer(top, len(chain)), base, top)


# --- the plan is right --------------------------------------------------------------------------------------------


@given(ranges())
def test_a_plan_is_right_for_any_chain_and_any_range(asked: Asked) -> None:
    chain, planned = asked.chain, asked.planned()
    files = chain.files
    kept, gone = files[: asked.base_index] + files[asked.top_index :], files[asked.base_index : asked.top_index]
    assert planned.chain is chain and not planned.is_empty
    assert (planned.base.file, planned.top.file) == (files[asked.base_index - 1], files[asked.top_index - 1])
    assert [image.file for image in planned.merged] == gone
    assert planned.result.files == kept
    assert planned.pivots == (asked.top_index == len(files))
    if planned.pivots:
        assert planned.overlay is None and planned.backing_name is None
    else:
        assert planned.overlay is not None and planned.overlay.file == files[asked.top_index]


@given(ranges())
def test_only_the_overlay_changes_and_only_in_what_it_says_of_its_backing_file(asked: Asked) -> None:
    planned = asked.planned()
    before = {image.file: image for image in asked.chain}
    for image in planned.result:
        old = before[image.file]
        if planned.overlay is not None and image.file == planned.overlay.file:
            assert (image.backing, image.backing_format) == (planned.backing_name, planned.base.format)
            assert replace(image, backing=old.backing, backing_format=old.backing_format) == old
        else:
            assert image == old


@given(ranges())
def test_shallow_merges_one_image_into_the_next(asked: Asked) -> None:
    planned = plan.commit(asked.chain, disk="vda", top=asked.top, shallow=True)
    assert planned.merged == (asked.chain[asked.top_index],)
    assert planned.base == asked.chain[asked.top_index - 1]


@given(chains())
def test_by_default_everything_goes_into_the_lowest_image(chain: Chain) -> None:
    planned = plan.commit(chain)
    assert planned.result.files == [chain.base.file]
    assert len(planned.merged) == len(chain) - 1


@pytest.mark.parametrize(
    "layers", [{}, {"base": "[1]"}, {"top": "[1]"}, {"base": "[1]", "top": "[1]"}, {"shallow": True}]
)
def test_a_chain_of_one_has_nothing_to_merge(layers: dict[str, object]) -> None:
    chain = linear(1)
    planned = plan.commit(chain, **layers)  # type: ignore[arg-type]
    assert planned.is_empty and not planned.pivots and planned.overlay is None
    assert planned.result == chain


def test_planning_twice_and_merging_in_two_steps_gives_the_same_chain() -> None:
    chain = linear(5)
    whole = plan.commit(chain, base="[1]", top="[4]").result
    first = plan.commit(chain, base="[1]", top="[2]").result
    second = plan.commit(first, base="[1]", top="[3]").result
    assert second == whole


# --- refusals -----------------------------------------------------------------------------------------------------


@given(ranges(upward=True))
def test_a_base_above_the_top_or_equal_to_it_is_refused(asked: Asked) -> None:
    with pytest.raises((BaseAboveTop, BaseIsTop)) as error:
        asked.planned()
    base, top = asked.chain[asked.base_index].file, asked.chain[asked.top_index].file
    if base == top:
        lowest = asked.base_index == 1
        assert (error.type, error.value.facts) == (BaseIsTop, {"base": base, "is_lowest": lowest, "pulls": False})
    else:
        assert (error.type, error.value.facts) == (BaseAboveTop, {"base": base, "top": top, "pulls": False})


def test_of_a_pull_the_base_is_not_what_is_pulled() -> None:
    with pytest.raises(BaseAboveTop, match="lies above") as error:
        plan.pull(linear(3), base="[3]", top="[2]")
    assert "name the image below it" in error.value.hint
    with pytest.raises(BaseIsTop) as same:
        plan.pull(linear(3), base="[3]")
    assert "pull all that lies below" in same.value.hint


def test_shallow_from_the_lowest_image_is_refused() -> None:
    with pytest.raises(BaseIsTop) as error:
        plan.commit(linear(3), top="[1]", shallow=True)
    assert error.value.base == "/vm/1"


def test_shallow_and_a_base_cannot_both_be_meant() -> None:
    with pytest.raises(OptionsConflict) as error:
        plan.commit(linear(3), base="[1]", shallow=True)
    assert error.value.options == ["--shallow", "--base"]


@pytest.mark.parametrize("where", ["base", "top"])
def test_a_layer_that_is_not_there_is_refused_by_the_name_the_user_gave_it(where: str) -> None:
    with pytest.raises(NoSuchLayer) as error:
        plan.commit(linear(2), disk="vda", **{where: "/vm/9"})  # type: ignore[arg-type]
    assert error.value.facts == {
        "layer": "/vm/9",
        "disk": "vda",
        "count": 2,
        "known": ["1 /vm/1", "2 /vm/2"],
        "nearest": None,
    }


@given(ranges(grown=False))
def test_exactly_those_ranges_are_refused_that_hold_an_image_shorter_than_the_base(asked: Asked) -> None:
    base, merged = asked.chain[asked.base_index], asked.chain.images[asked.base_index : asked.top_index]
    shorter = [image for image in merged if image.virtual_size < base.virtual_size]
    assert asked.planned().merged == merged
    refusals = [refusal for refusal in asked.planned().refusals if isinstance(refusal, ShorterLayer)]
    assert [refusal.facts for refusal in refusals] == [
        {
            "image": image.file,
            "size": image.virtual_size,
            "base": base.file,
            "base_size": base.virtual_size,
            "instead": "merge into an image above the short one",
        }
        for image in shorter
    ]


def test_a_short_image_outside_the_range_does_no_harm() -> None:
    images = list(linear(4))
    images[0] = replace(images[0], virtual_size=4 * MIB)
    images[3] = replace(images[3], virtual_size=4 * MIB)
    assert plan.commit(Chain(tuple(images)), base="[2]", top="[3]").merged == (images[2],)


# --- the string for the header ------------------------------------------------------------------------------------


def qemu_opens(name: str, folder: str) -> str:
    """What QEMU would open for a backing name in an image of that folder (path_combine and path_has_protocol)."""
    colon, slash = name.find(":"), name.find("/")
    assert colon == -1 or -1 < slash < colon, f"{name} would be taken for a protocol"
    return posixpath.normpath(posixpath.join(folder, name))


@given(ranges(above=1))
def test_the_new_name_leads_from_the_overlays_folder_to_the_base(asked: Asked) -> None:
    planned = asked.planned()
    assert planned.overlay is not None and planned.backing_name is not None
    if planned.base.has_path:
        folder = posixpath.dirname(planned.overlay.file)
        assert qemu_opens(planned.backing_name, folder) == posixpath.normpath(planned.base.file)
        written = planned.overlay.backing
        assert written is not None, "it has a backing image"
        assert planned.backing_name.startswith("/") == written.startswith("/"), "relative stays relative"
    else:
        assert planned.backing_name == asked.chain[asked.base_index + 1].backing


@pytest.mark.parametrize(
    ("overlay", "written", "base", "name"),
    [
        ("/vm/c", "b", "/vm/base.raw", "base.raw"),
        ("/vm/c", "./b", "/vm/base.raw", "base.raw"),
        ("/vm/c", "../vm/b", "/vm/base.raw", "base.raw"),
        ("/vm/c", "/vm/b", "/vm/base.raw", "/vm/base.raw"),
        ("/vm/c", "b", "/gold/base.raw", "../gold/base.raw"),
        ("/vm/new/c", "../b", "/vm/base.raw", "../base.raw"),
        ("/c", "b", "/base.raw", "base.raw"),
        ("/c", "b", "/vm/base.raw", "vm/base.raw"),
        ("/vm/c", "b", "/vm/2024:05.raw", "./2024:05.raw"),
        ("/vm/c", "b", "/vm/x:y/base", "./x:y/base"),
        ("/vm/c", "b", "/vm/x/y:z", "x/y:z"),
        ("/vm/c", "./b:1", "/vm/base.raw", "base.raw"),
        ("/vm/c", "file:b", "/vm/base.raw", "/vm/base.raw"),
        ("/vm/c", 'json:{"driver":"qcow2"}', "/vm/base.raw", "/vm/base.raw"),
        ("/vm/c", "nbd://host/b", "/vm/base.raw", "/vm/base.raw"),
        ("/vm/c", None, "/vm/base.raw", "/vm/base.raw"),
        ("nbd://host/c", "b", "/vm/base.raw", "/vm/base.raw"),
        ("/vm/c", "b", "/vm/space and ü", "space and ü"),
    ],
)
def test_the_name_is_written_like_this(overlay: str, written: str | None, base: str, name: str) -> None:
    assert backing_name(image(overlay, written), image(base), image("/vm/a", base)) == name


def test_a_base_without_a_path_keeps_the_name_that_its_present_child_has_for_it() -> None:
    base = image("nbd://host:10809/base")
    assert backing_name(image("/vm/c", "b"), base, image("/vm/a", "nbd://host/base")) == "nbd://host/base"
    assert backing_name(image("/vm/c", "b"), base, image("/vm/a", None)) == "nbd://host:10809/base"


def test_a_name_that_says_more_than_a_path_is_kept() -> None:
    for name in ('json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"/vm/base.raw"}}', "nbd://h/b"):
        assert backing_name(image("/vm/c", "b"), image("/vm/base.raw"), image("/vm/a", name)) == name


def test_a_part_of_a_file_is_named_as_such() -> None:
    base = replace(image("/vm/box"), format="raw", slice=Slice(512, 1024))
    name = backing_name(image("/vm/c", "b"), base, image("/vm/a", "box"))
    assert name == (
        'json:{"driver": "raw", "offset": 512, "size": 1024, "file": {"driver": "file", "filename": "/vm/box"}}'
    )
    part = name.removeprefix("json:")
    base = replace(base, format="qcow2")
    assert (
        backing_name(image("/vm/c", "b"), base, image("/vm/a", None)) == f'json:{{"driver": "qcow2", "file": {part}}}'
    )
    with pytest.raises(BackingString, match="does not tell which"):
        backing_name(image("/vm/c", "b"), replace(base, slice=Slice(None, 512)), image("/vm/a", "box"))


def test_a_path_is_not_written_for_what_has_none() -> None:
    with pytest.raises(BackingString, match="no path"):
        backing_name(image("/vm/new/c", "b"), image("nbd://host/base"), image("/vm/a", "base.raw"))


@pytest.mark.parametrize(("character", "width"), [("x", 1), ("ü", 2), ("虚", 3), ("\udcff", 1)])
def test_a_name_may_have_as_many_bytes_as_a_header_has_room_for(character: str, width: int) -> None:
    longest = "/" + "a" * ((HEADER_LIMIT - 1) % width) + character * ((HEADER_LIMIT - 1) // width)
    overlay, child = image("/vm/c", "/vm/b"), image("/vm/a", longest)
    assert len(os.fsencode(longest)) == HEADER_LIMIT == 1023
    assert backing_name(overlay, image(longest), child) == longest
    with pytest.raises(BackingString) as error:
        backing_name(overlay, image(longest + "a"), child)
    assert error.value.facts == {
        "overlay": "/vm/c",
        "backing": longest + "a",
        "reason": "1024 bytes, the header has room for 1023",
    }


def test_a_plan_with_a_name_that_does_not_fit_is_refused() -> None:
    long = image("/" + "x" * 1200)
    chain = Chain((long, image("/vm/a", long.file), image("/vm/b", "/vm/a")))
    (refusal,) = plan.commit(chain, top="[2]").refusals
    assert isinstance(refusal, BackingString)
    assert not plan.commit(chain).refusals  # nothing is written into a header


def test_a_long_base_is_within_reach_where_its_relative_name_is_short() -> None:
    folder = "/" + "x" * 1200
    overlay, base = image(f"{folder}/c", "b"), image(f"{folder}/base")
    assert backing_name(overlay, base, image(f"{folder}/a", "base")) == "base"


# --- the newest overlays stay -----------------------------------------------------------------------------------------


@given(st.sampled_from(["commit", "pull"]), chains(), st.integers(0, 12))
def test_what_is_kept_is_the_base_and_the_newest_overlays(direction: Direction, chain: Chain, keep: int) -> None:
    planned = plan.keeping(direction, chain, keep)
    kept = chain.files[:1] + chain.files[max(1, len(chain) - keep) :]
    assert planned.result.files == kept
    assert planned.merged == tuple(image for image in chain if image.file not in kept)
    assert planned.pivots == (keep == 0 and len(chain) > 1)
    assert planned.is_empty or planned.direction == (direction if keep else "commit")


def test_what_is_kept_is_counted_above_a_base_that_is_named() -> None:
    planned = plan.keeping("commit", linear(5), 2, base="[2]")
    assert (planned.result.files, planned.base_is_named) == (["/vm/1", "/vm/2", "/vm/4", "/vm/5"], True)
    assert plan.keeping("commit", linear(5), 4, base="[2]").is_empty
