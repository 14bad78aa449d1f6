"""Names on a terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpmerge.cli.render.visible import visible

anything = st.text(st.characters(exclude_categories=()))
"""Any text at all, lone surrogates included: a file name may hold any byte but ``/`` and NUL."""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/vm/plain name.qcow2", "/vm/plain name.qcow2"),
        ("/vm/größe-虚拟.qcow2", "/vm/größe-虚拟.qcow2"),
        ("a\x1b[31mred", r"a\x1b[31mred"),
        ("a\nb\tc\rd", r"a\x0ab\x09c\x0dd"),
        ("nul\0del\x7f", r"nul\x00del\x7f"),
        ("csi\x9b2J", r"csi\x9b2J"),
        ("evil\u202efdp.exe", r"evil\u202efdp.exe"),
        ("line\u2028para\u2029", r"line\u2028para\u2029"),
        ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
        ("tag\U000e0041", r"tag\U000e0041"),
        (b"byte\xff\x80.raw".decode(errors="surrogateescape"), r"byte\xff\x80.raw"),
        ("lone\ud800", r"lone\ud800"),
    ],
)
def test_what_a_terminal_would_obey_or_hide_is_spelled_out(text: str, said: str) -> None:
    assert visible(text) == said


@given(anything)
def test_a_name_made_visible_is_always_printable(text: str) -> None:
    said = visible(text)
    assert said.isprintable()
    said.encode()  # no surrogate is left, so that any UTF-8 stream takes it


@given(anything.filter(str.isprintable))
def test_a_printable_name_is_shown_as_it_is(text: str) -> None:
    assert visible(text) == text


def test_things_that_are_no_text_are_made_visible_too() -> None:
    assert visible(ValueError("a\nb")) == r"a\x0ab"
