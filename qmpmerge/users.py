"""Users by the names that people know."""

import pwd


def name(uid: int) -> str:
    """As `id -nu` tells it; the number where nobody here is called anything by it, as in another container."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError, TypeError):
        return str(uid)
