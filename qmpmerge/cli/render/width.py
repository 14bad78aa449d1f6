"""How wide a text is on a terminal, and how it is made narrower."""


def width(text: str) -> int:
    """In columns: those of East Asia take two, those that combine with what is before them none."""
    if text.isascii():
        return len(text)
    return sum(map(_width, text))


def _width(character: str) -> int:
    import unicodedata  # few names need it

    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def padded(text: str, columns: int, *, right: bool = False) -> str:
    """As `str.ljust` or `str.rjust`."""
    space = " " * (columns - width(text))
    return space + text if right else text + space


def shortened(text: str, columns: int) -> str:
    """``/very/lo…/c.qcow2``: the middle goes, the last part of a path only where it is too long by itself."""
    if width(text) <= columns:
        return text
    folder, slash, name = text.rpartition("/")
    room = columns - width(slash + name) - 1
    if slash and room > 0:
        return f"{_first(folder, room)}…{slash}{name}"
    half = (columns - 1) // 2
    return f"{_first(text, columns - 1 - half)}…{_first(text[::-1], half)[::-1]}"


def cut(text: str, columns: int) -> str:
    """The first so many columns of it."""
    return text if width(text) <= columns else _first(text, columns - 1) + "…"


def _first(text: str, columns: int) -> str:
    kept = ""
    for character in text:
        if width(kept + character) > columns:
            break
        kept += character
    return kept
