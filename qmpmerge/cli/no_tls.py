"""asyncio without OpenSSL, for commands that are over before it would have been loaded."""

import sys
from types import ModuleType


def import_asyncio() -> None:
    """
    Import asyncio as where Python was built without TLS, which no monitor speaks: loading OpenSSL takes a tenth of the time of
    a short command.
    """
    if "asyncio" in sys.modules or "ssl" in sys.modules:
        return
    sys.modules["ssl"] = None  # type: ignore[assignment]  # which makes its import fail
    import asyncio  # noqa: F401

    stand_in = ModuleType("ssl")
    stand_in.SSLContext = object  # type: ignore[attr-defined]  # all that qemu.qmp wants of it is the type of an argument
    sys.modules["ssl"] = stand_in
    import qmpmerge.qemu.monitor  # noqa: F401

    del sys.modules["ssl"]
