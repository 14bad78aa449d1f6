"""Images from elsewhere, whose headers may hold anything: no traceback, nothing written that is not theirs, nothing lost."""

import random
from pathlib import Path

import pytest
from rig import mutations, nasty
from rig.command import attempt, complaints
from rig.headers import raw_header
from rig.mutations import Case, make_stock

IMAGES_A_TEST = 5


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stock(tmp_path_factory.mktemp("stock") / "images")


@pytest.mark.parametrize("first", range(0, 20, IMAGES_A_TEST))
def test_a_mutilated_image(first: int, stock: Path, tmp_path: Path) -> None:
    """`scripts/faults FI` takes five hundred."""
    for seed in range(first, first + IMAGES_A_TEST):
        case = Case(stock, tmp_path / str(seed), seed)
        found = case.play()
        assert found.wrong == [], (seed, case.what)


def test_the_whole_image_is_merged_and_the_bench_sees_a_loss(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutations, "MUTATIONS", [lambda chance, data: None])
    seeds = [seed for seed in range(20) if random.Random(seed).choice([1, 1, 2, 3]) == 1]
    found = [Case(stock, tmp_path / str(seed), seed).play() for seed in seeds[:2]]
    assert any(one.merged for one in found) and not any(one.wrong for one in found)
    broken = Case(stock, tmp_path / "broken", seeds[0])
    (tmp_path / "broken" / "vm" / "c.qcow2").unlink()
    before = mutations.Seen.of(stock / "vm")
    broken.compare(before, mutations.Seen.of(tmp_path / "broken" / "vm"), "unlinked")
    assert broken.found.lost == 1


@pytest.mark.parametrize("kind", ["backing", "format", "data"])
def test_any_name_in_a_header(kind: str, tmp_path: Path) -> None:
    """All in one folder, which is looked through as a whole, and some of them one by one."""
    chance = random.Random(kind)
    for number, name in enumerate(nasty.NAMES):
        headers = {
            "backing": raw_header(name, b"raw"),
            "format": raw_header(b"base.raw", name),
            "data": raw_header(data_file=name),
        }
        (tmp_path / f"{number}.qcow2").write_bytes(headers[kind])
    (tmp_path / "base.raw").write_bytes(bytes(512))
    lines = [["doctor", "."], ["clean", "."], ["recover", ".", "--dry-run"]]
    for number in chance.sample(range(len(nasty.NAMES)), 12):
        lines.append([chance.choice(["doctor", "chain", "commit"]), f"{number}.qcow2"])
    for arguments in lines:
        run = attempt(*arguments, cwd=tmp_path)
        assert complaints(run) == [], (arguments, run)
