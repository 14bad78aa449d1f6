"""Images and chains as values: which image a user means, and what a chain refuses to be."""

import dataclasses
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpmerge.chain.chain import Chain, Image, draw, told_apart

SIZE = 1024**2


def image(file: str, **facts: object) -> Image:
    return dataclasses.replace(Image(file, "qcow2", SIZE), **facts)  # type: ignore[arg-type]


def chain_of(*files: str) -> Chain:
    return Chain(tuple(image(file) for file in files))


argument = st.one_of(st.text("ab[1]/.:ü", max_size=8), st.binary(max_size=8)).map(
    lambda text: os.fsdecode(text).replace("\0", "")
)
"""Anything that can come from a command line: bytes that are no UTF-8, but no NUL."""

name = argument.map(lambda text: text.replace("/", "")).filter(lambda text: text not in ("", ".", ".."))
path = st.tuples(st.sampled_from(["/", "/vm/", "/a/b/"]), name).map("".join)
uri = st.sampled_from(["nbd://host/", "rbd:pool/"]).flatmap(
    lambda prefix: st.integers(1, 99).map(lambda n: f"{prefix}{n}")
)
files = st.lists(path | uri, min_size=1, max_size=12, unique=True)
chains = files.map(
    lambda found: Chain(tuple(image(file, node=f"#block{number}") for number, file in enumerate(found, 100)))
)
"""Any chain of 1 to 12 images, with the node names that QEMU gives them."""


# --- what a chain is ----------------------------------------------------------------------------------------------


@given(chains)
def test_a_chain_counts_from_the_base_up(chain: Chain) -> None:
    assert chain[1] is chain.base and chain[len(chain)] is chain.active
    assert [chain[index] for index in range(1, len(chain) + 1)] == list(chain)
    assert [chain.index(image) for image in chain] == list(range(1, len(chain) + 1))
    assert chain.files == [image.file for image in chain.images]


@given(chains, st.integers())
def test_there_is_no_image_zero_and_none_counted_from_the_end(chain: Chain, index: int) -> None:
    if 1 <= index <= len(chain):
        assert chain[index] in chain.images
    else:
        with pytest.raises(IndexError):
            chain[index]


def test_a_chain_is_not_empty() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Chain(())


def test_no_image_stands_twice_in_a_chain() -> None:
    with pytest.raises(ValueError, match="twice"):
        chain_of("/vm/a", "/vm/b", "/vm/a")


def test_no_file_stands_twice_under_two_names() -> None:
    one, other = image("/vm/a", inode=(1, 2)), image("/vm/link-to-a", inode=(1, 2))
    with pytest.raises(ValueError, match="twice"):
        Chain((one, other))


def test_a_chain_can_be_told_from_another_by_its_files_and_their_order() -> None:
    chain = chain_of("/vm/a", "/vm/b")
    assert chain.same_files(chain_of("/vm/a", "/vm/b"))
    assert not chain.same_files(chain_of("/vm/b", "/vm/a"))
    assert not chain.same_files(chain_of("/vm/a"))
    assert not chain.same_files(chain_of("/vm/a", "/vm/b", "/vm/c"))


def test_a_file_is_the_same_under_another_name_and_another_one_under_its_own_is_not() -> None:
    here, linked = image("/vm/a", inode=(1, 2)), image("/old/a", inode=(1, 2))
    replaced, unknown = image("/vm/a", inode=(1, 3)), image("/vm/a")
    assert here.same_as(linked) and not here.same_as(replaced)
    assert not here.same_as(unknown) and not unknown.same_as(here)
    assert unknown.same_as(image("/vm/a")) and not unknown.same_as(image("/old/a"))


def test_what_is_not_known_may_be_what_is_called_like_it() -> None:
    here, unknown = image("/vm/a", inode=(1, 2)), image("/vm/a")
    assert here.may_be(unknown) and unknown.may_be(here)
    assert not here.may_be(image("/vm/a", inode=(1, 3))) and not unknown.may_be(image("/old/a", inode=(1, 2)))


def test_chains_are_told_apart_by_inodes_where_names_are_not_enough() -> None:
    lowest, other = image("/vm/a", inode=(1, 2)), image("/vm/a", inode=(1, 3))
    top = image("/vm/b", inode=(1, 4), backing="a")
    assert told_apart(Chain((lowest, top)), Chain((other, top))) == (
        "/vm/a (inode 2 on device 1) <-- /vm/b (backing a)",
        "/vm/a (inode 3 on device 1) <-- /vm/b (backing a)",
    )
    assert told_apart(Chain((lowest, top)), Chain((image("/vm/a"), top)))[1] == (
        "/vm/a (which file is not known) <-- /vm/b (backing a)"
    )
    assert told_apart(Chain((lowest, top)), Chain((top,))) == ("/vm/a <-- /vm/b (backing a)", "/vm/b (backing a)")


# --- drawing ------------------------------------------------------------------------------------------------------


def test_a_chain_is_drawn_as_users_draw_it() -> None:
    assert str(chain_of("/vm/base.raw", "/vm/a.qcow2", "/vm/b.qcow2")) == "base.raw <-- a.qcow2 <-- b.qcow2"


def test_names_that_stand_twice_are_drawn_with_their_folders() -> None:
    assert str(chain_of("/old/disk", "/new/disk")) == "/old/disk <-- /new/disk"


def test_an_image_without_a_path_is_drawn_by_its_uri() -> None:
    assert str(chain_of("nbd://host/base", "/vm/a")) == "nbd://host/base <-- a"


@given(chains)
def test_a_drawing_names_every_image_once(chain: Chain) -> None:
    parts = draw(chain.images).split(" <-- ")
    assert len(set(parts)) == len(parts) == len(chain)
