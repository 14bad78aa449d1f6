"""Text as it may go to a terminal."""


def visible(text: object) -> str:
    """The text with control characters, broken bytes and direction marks spelled out: file names may hold anything."""
    return "".join(c if c.isprintable() else _spelled(c) for c in str(text))


def _spelled(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8, as the filesystem interface hands it over
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
