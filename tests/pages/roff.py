"""Text in man(7): a line a sentence, what is typed in bold, what stands for something else in italics."""

import re
import textwrap

WIDTH = 79

_SENTENCE_END = re.compile(r"(?<=[.:?!])\s+(?=[A-Z\d`])")
_TYPED = re.compile(r"`([^`]+)`|(?<![\w./-])(--?[A-Za-z][a-z-]*)")
_VARIABLE = re.compile(r"(?<![\w.])([A-Z]{2,}|N)(?!\w)")
_SYMBOLS = str.maketrans({"\\": r"\e", "-": r"\-", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti"})


def plain(text: str) -> str:
    """Letter by letter what it says; every hyphen can be copied into a shell."""
    return _no_request(text.translate(_SYMBOLS))


def bold(text: str) -> str:
    """As it is typed."""
    return rf"\fB{text.translate(_SYMBOLS)}\fR"


def usage(text: str) -> str:
    """The words that stand for others are in capitals."""
    return _VARIABLE.sub(r"\\fI\1\\fR", text.translate(_SYMBOLS))


def prose(*paragraphs: str) -> str:
    """Running text."""
    return "\n.PP\n".join("\n".join(map(filled, _SENTENCE_END.split(" ".join(one.split())))) for one in paragraphs)


def verbatim(text: str) -> str:
    """Lines that stay as they are."""
    return "\n".join([".nf", *map(plain, text.split("\n")), ".fi"])


def item(label: str, text: str) -> str:
    """One of a list, under a label that is in roff already."""
    return f".TP\n{label}\n{prose(text)}"


def filled(sentence: str) -> str:
    """In lines that are not too long."""
    words = "".join(_pieces(sentence))
    lines = textwrap.wrap(words, WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join(map(_no_request, lines))


def _pieces(sentence: str) -> list[str]:
    """Every third piece is between backticks, the one behind it an option."""
    between = iter(_TYPED.split(sentence))
    found = [next(between).translate(_SYMBOLS)]
    for code, option, text in zip(between, between, between, strict=True):
        found += [bold(code or option), text.translate(_SYMBOLS)]
    return found


def _no_request(line: str) -> str:
    """A line that begins with a period would be one."""
    return rf"\&{line}" if line.startswith(".") else line
