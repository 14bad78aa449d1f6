"""Which image of a chain is meant by a word, and what is told where it means none, or two."""

import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpmerge.chain.chain import Chain, Image
from qmpmerge.chain.layer import MOST_TOLD, LayerName
from qmpmerge.errors import AmbiguousLayer, NoSuchLayer


def image(file: str, **facts: object) -> Image:
    return dataclasses.replace(Image(file, "qcow2", 1024**2), **facts)  # type: ignore[arg-type]


def chain_of(*files: str, nodes: tuple[str, ...] = ()) -> Chain:
    images = [image(file) for file in files]
    named = [dataclasses.replace(one, node=node) for one, node in zip(images, nodes, strict=False)]
    return Chain((*named, *images[len(named) :]))


def on_disk(folder: Path, *names: str) -> Chain:
    """A chain of files that are there, known by their inodes as a running QEMU's are."""
    images = []
    for name in names:
        (folder / name).touch()
        status = (folder / name).stat()
        images.append(image(str(folder / name), inode=(status.st_dev, status.st_ino)))
    return Chain(tuple(images))


def refused(chain: Chain, layer: LayerName, disk: str = "vda") -> NoSuchLayer:
    with pytest.raises(NoSuchLayer) as error:
        chain.find(layer, disk)
    return error.value


def ambiguous(chain: Chain, layer: LayerName, disk: str = "vda") -> AmbiguousLayer:
    """The refusal, each of whose words must mean one image, and each another."""
    with pytest.raises(AmbiguousLayer) as error:
        chain.find(layer, disk)
    meant = [chain.find(word, disk) for word in error.value.words]
    assert len({one.identity for one in meant}) == len(meant) > 0
    return error.value


EASY = chain_of("/vm/base.raw", "/vm/a.qcow2", "/vm/b.qcow2", nodes=("base", "#block2", "top"))

argument = st.one_of(st.text("ab[1]/.-:ü", max_size=8), st.binary(max_size=8)).map(
    lambda text: os.fsdecode(text).replace("\0", "")
)
"""Anything that can come from a command line: bytes that are no UTF-8, but no NUL."""

name = argument.map(lambda text: text.replace("/", "")).filter(lambda text: text not in ("", ".", ".."))
path = st.tuples(st.sampled_from(["/", "/vm/", "/a/b/"]), name).map("".join)
chains = st.lists(path, min_size=1, max_size=12, unique=True).map(
    lambda found: chain_of(*found, nodes=tuple(f"#block{number}" for number in range(len(found))))
)


# --- one meaning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [3, -1, "3", "-1", "[3]", "[-1]", "vda[3]", "vda[-1]", "top", "b.qcow2", "/vm/b.qcow2", Path("/vm/b.qcow2")],
    ids=repr,
)
def test_every_way_to_name_the_third_of_three(layer: LayerName) -> None:
    assert EASY.find(layer, "vda") is EASY.active


@given(chains)
def test_index_path_and_node_mean_the_same_image_whatever_the_files_are_called(chain: Chain) -> None:
    for index, wanted in enumerate(chain, 1):
        assert wanted.node is not None
        for layer in (index, index - 1 - len(chain), Path(wanted.file), wanted.file, wanted.node):
            assert chain.find(layer, "vda") is wanted


@given(chains, argument)
def test_a_word_means_at_most_one_image_or_is_refused(chain: Chain, word: str) -> None:
    """And whatever is found is what one of the ways to name it says."""
    try:
        found = chain.find(word, "vda")
    except (NoSuchLayer, AmbiguousLayer) as error:
        assert error.hint and len(error.known) <= MOST_TOLD + 1
        return
    index = chain.index(found)
    ways = {found.file, found.name, found.node, os.path.abspath(word) if word else word}
    numbers = {f"{before}{number}{after}" for number in (index, index - 1 - len(chain)) for before, after in AROUND}
    assert word in numbers or not ways.isdisjoint({word, os.path.normpath(word)})


AROUND = [("", ""), ("[", "]"), ("vda[", "]")]


@pytest.mark.parametrize(
    "layer",
    [
        *("[0]", "[4]", "[]", "[a]", "[1", "1]", "[ 1]", "[1] ", "vdb[1]", "vda[0]", "vda[-4]", "a", "", "/vm", "/"),
        *("0", "-0", "4", "-4", "+1", "01", "1.0", " 1", "1 ", "--1", "-", "٣", "[٣]", "²", "1_0", "0x1"),
        *("9" * 5000, f"[{'9' * 5000}]", f"-{'9' * 5000}", "top ", "a\0b"),
        *(0, 4, -4, 10**30, Path("3"), Path("b.qcow2"), Path("top")),
    ],
    ids=lambda layer: repr(layer)[:20],
)
def test_what_is_no_image_of_the_chain(layer: LayerName) -> None:
    error = refused(EASY, layer)
    assert (error.layer, error.count) == (str(layer), 3)
    assert error.known == ["1 /vm/base.raw", "2 /vm/a.qcow2", "3 /vm/b.qcow2"]


def test_without_a_disk_only_the_bare_index_is_understood() -> None:
    chain = chain_of("/vm/a", "/vm/b")
    assert chain.find("[2]") is chain.find("2") is chain.active
    assert refused(chain, "vda[2]", "").disk == "/vm/b"  # what it is known by


def test_a_disk_name_with_brackets_takes_an_index_too() -> None:
    chain, disk = chain_of("/vm/a", "/vm/b"), "/machine/unattached/device[3]"
    assert chain.find(f"{disk}[2]", disk) is chain.active


def test_a_symlink_means_the_image_that_it_leads_to(tmp_path: Path) -> None:
    chain = on_disk(tmp_path, "a", "b")
    (tmp_path / "current").symlink_to("b")
    (tmp_path / "again").symlink_to(tmp_path / "current")
    assert chain.find(str(tmp_path / "current")) is chain.active
    assert chain.find(tmp_path / "again") is chain.active


def test_a_path_through_a_linked_folder_means_the_image_in_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to("real")
    chain = on_disk(tmp_path / "real", "a", "b")
    assert chain.find(str(tmp_path / "linked" / "a")) is chain.base
    assert chain.find(str(tmp_path / "real" / ".." / "linked" / "b")) is chain.active


def test_a_relative_path_means_the_file_that_the_user_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = on_disk(tmp_path, "a", "b")
    monkeypatch.chdir(tmp_path)
    assert chain.find("a") is chain.base and chain.find("./b") is chain.find(Path("b")) is chain.active


def test_a_file_name_is_enough_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    chain = on_disk(tmp_path, "a[1].qcow2", "b c.qcow2", "d")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [chain.find(name, "a") for name in ("a[1].qcow2", "b c.qcow2", "d")] == list(chain)


def test_a_hard_link_is_the_file_itself(tmp_path: Path) -> None:
    chain = on_disk(tmp_path, "a", "b")
    os.link(tmp_path / "a", tmp_path / "other-name")
    assert chain.find(str(tmp_path / "other-name")) is chain.base


def test_a_path_where_another_file_lies_now_does_not_mean_the_image(tmp_path: Path) -> None:
    chain = on_disk(tmp_path, "a", "b")
    (tmp_path / "a").rename(tmp_path / "away")
    (tmp_path / "a").touch()
    refused(chain, str(tmp_path / "a"))
    assert chain.find(str(tmp_path / "away")) is chain.base


def test_a_path_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    chain = on_disk(tmp_path, "a", "b")
    (tmp_path / "loop").symlink_to("loop")
    for layer in ("missing", "loop", "a/b"):
        refused(chain, str(tmp_path / layer))


def test_without_an_inode_a_symlink_is_followed_by_name(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "link").symlink_to("a")
    chain = chain_of(str(tmp_path / "a"))
    assert chain.find(str(tmp_path / "link")) is chain.base


def test_a_uri_means_itself_and_nothing_else() -> None:
    chain = chain_of("nbd://host/base", "/vm/a")
    assert chain.find("nbd://host/base") is chain.base
    for layer in ("nbd://host/base/", "host/base", "/host/base", "base"):
        refused(chain, layer)


def test_a_uri_as_the_header_above_has_it() -> None:
    chain = Chain((image("nbd://host/base"), image("/vm/a", backing="nbd+tcp://host:10809/base")))
    assert chain.find("nbd+tcp://host:10809/base") is chain.base


# --- two meanings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["2", "-1", "[2]", "[-1]", "vda[2]"])
def test_an_index_that_is_the_name_of_another_image(word: str) -> None:
    chain = chain_of(f"/vm/{word}", "/vm/b")
    error = ambiguous(chain, word)
    assert (error.count, error.known) == (2, [f"1 /vm/{word}", "2 /vm/b"])
    assert chain.find(f"/vm/{word}", "vda") is chain.base and chain.find(2) is chain.find(-1) is chain.active
    assert chain_of("/vm/a", f"/vm/{word}").find(word, "vda").file == f"/vm/{word}"  # both mean this one


def test_an_index_that_is_the_node_of_another_image() -> None:
    error = ambiguous(chain_of("/vm/a", "/vm/b", "/vm/c", nodes=("3",)), "3")
    assert error.words == ["1", "[3]"]


def test_a_node_that_is_the_file_name_of_another_image() -> None:
    error = ambiguous(chain_of("/vm/a", "/vm/b", nodes=("b", "a")), "a")
    assert "name the one that is meant: `1` or `2`" in error.hint


def test_a_file_name_that_several_images_have() -> None:
    chain = chain_of("/old/disk", "/new/disk", "/vm/c")
    assert ambiguous(chain, "disk").known == ["1 /old/disk", "2 /new/disk"]
    assert chain.find("/old/disk") is chain.base


def test_of_hundreds_of_one_name_a_few_are_told() -> None:
    error = ambiguous(chain_of(*(f"/vm/{number}/disk" for number in range(300))), "disk")
    assert (error.count, len(error.known), len(error.words)) == (300, MOST_TOLD, MOST_TOLD)
    assert "300 images" in str(error)


def test_a_file_here_that_is_no_image_of_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the folder of another VM, or of a backup."""
    (tmp_path / "vm").mkdir()
    chain = on_disk(tmp_path / "vm", "a.qcow2", "2")
    for name in ("a.qcow2", "2", "1"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    error = ambiguous(chain, "a.qcow2")
    assert (error.count, error.known[1]) == (2, f"{tmp_path}/a.qcow2 (not in the chain)")
    assert chain.find("1") is chain.base  # the name of nothing in the chain
    ambiguous(chain, "2")
    refused(chain, "./a.qcow2")


def test_the_image_here_and_one_of_its_name_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
    chain = Chain((*on_disk(tmp_path / "old", "disk"), *on_disk(tmp_path / "new", "disk")))
    monkeypatch.chdir(tmp_path / "new")
    assert ambiguous(chain, "disk").words == ["1", "2"]
    assert chain.find("./disk") is chain.active


# --- what is told ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("B.QCOW2", "b.qcow2"),
        ("b.qcow", "b.qcow2"),
        ("b", "b.qcow2"),
        ("/vm/B.qcow2", "/vm/b.qcow2"),
        ("/elsewhere/b.qcow2", "/vm/b.qcow2"),
        ("VDA[2]", "vda[2]"),
        ("TOP", "top"),
        ("tpo", "top"),
        ("c.qcow2", None),  # however alike it is to b.qcow2
        ("/vm/d.qcow2", None),
        ("vdb[7]", None),
        ("nonsense", None),
        ("x" * 100_000, None),
    ],
)
def test_what_may_have_been_meant(word: str, meant: str | None) -> None:
    error = refused(EASY, word)
    assert error.nearest == meant
    assert meant is None or EASY.find(meant, "vda") is EASY[error.known.index(next(iter(matching(error, meant)))) + 1]
    assert ("did you mean" in error.hint) == (meant is not None)


def matching(error: NoSuchLayer, meant: str) -> list[str]:
    return [one for one in error.known if one.endswith(meant) or meant in ("top", f"vda[{one.split()[0]}]")][-1:]


def long_chain(count: int) -> Chain:
    return chain_of(*(f"/vm/snap{number}.qcow2" for number in range(1, count + 1)))


@pytest.mark.parametrize(
    ("word", "first", "last"),
    [("201", 191, 200), ("-201", 1, 10), ("nonsense", 191, 200), ("SNAP100.qcow2", 95, 104), ("snp3", 1, 10)],
)
def test_of_a_long_chain_the_nearest_ten_are_told(word: str, first: int, last: int) -> None:
    error = refused(long_chain(200), word)
    assert error.known == [f"{index} /vm/snap{index}.qcow2" for index in range(first, last + 1)]
    assert "10 of its 200 images" in error.hint and error.count == 200


def test_a_name_with_another_number_is_another_image() -> None:
    assert refused(chain_of("/vm/base.raw", "/vm/snap1.qcow2"), "snap2.qcow2").nearest is None


def test_of_two_that_are_as_alike_none_is_suggested() -> None:
    assert refused(chain_of("/vm/disk-a", "/vm/disk-b"), "disk-c").nearest is None
