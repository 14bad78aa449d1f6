"""How wide a name is, and how it is made narrower."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpmerge.cli.render.width import cut, padded, shortened, width

printable = st.text(st.characters(exclude_categories=("C", "Z", "M")), max_size=60)


@pytest.mark.parametrize(
    ("text", "columns"),
    [("", 0), ("c.qcow2", 7), ("虚拟.raw", 8), ("größe", 5), ("gro\u0308ße", 5), ("ﾊﾝｶｸ", 4), ("Ｆ", 2), ("한글", 4)],
)
def test_a_name_is_as_wide_as_it_is_shown(text: str, columns: int) -> None:
    assert width(text) == columns
    assert padded(text, columns + 2) == f"{text}  " and padded(text, columns + 2, right=True) == f"  {text}"


@pytest.mark.parametrize(
    ("text", "columns", "said"),
    [
        ("/vm/c.qcow2", 11, "/vm/c.qcow2"),
        ("/very/long/path/c.qcow2", 18, "/very/lon…/c.qcow2"),
        ("/very/long/path/c.qcow2 *", 18, "/very/l…/c.qcow2 *"),
        ("/very/long/path/c.qcow2", 9, "/ver…cow2"),
        ("a-name-without-folders", 11, "a-nam…lders"),
        ("/镜像/很长的文件夹/c.qcow2", 16, "/镜像/…/c.qcow2"),
    ],
)
def test_the_middle_of_a_path_goes_first(text: str, columns: int, said: str) -> None:
    assert shortened(text, columns) == said


@given(printable, st.integers(3, 40))
def test_what_is_made_narrower_fits(text: str, columns: int) -> None:
    for made in (shortened(text, columns), cut(text, columns)):
        assert width(made) <= columns
        assert made == text or "…" in made


@given(st.lists(printable.filter(lambda part: "/" not in part), min_size=2), st.integers(12, 40))
def test_the_last_part_of_a_path_is_kept_where_there_is_room_for_it(parts: list[str], columns: int) -> None:
    last = parts[-1]
    if width(last) <= columns - 3:
        assert shortened("/" + "/".join(parts), columns).endswith(last)
