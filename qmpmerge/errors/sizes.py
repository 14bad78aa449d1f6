"""Sizes as people read them."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(count: float | None) -> str:
    """``1.5 GiB``; a dash for what is not known."""
    if count is None:
        return "-"
    power = 0
    while round(count / 1024**power, 1) >= 1024 and power < len(_UNITS) - 1:
        power += 1
    value = round(count / 1024**power, 1)
    digits = 0 if value >= 100 or value == int(value) else 1
    return f"{value:.{digits}f} {_UNITS[power]}"
