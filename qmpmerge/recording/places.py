"""
Where the files of a recording are while it is replayed: below a folder that is private to the replay, each of them.

So nothing that a client does to them reaches a file of this machine, whatever has the same name here: neither by the names that
QEMU tells, nor through the sockets of agents and servers that it tells.
"""

import json
import os
import re
from typing import Any

_QOM = re.compile(r"/(?:machine|objects|chardevs|backend)(?:/[^/.][^/]*)*")
"""Paths of QEMU's objects, which are no files."""

_SOCKET = re.compile(r"(?<![+\w])unix:/*")
_INSIDE = re.compile(r"(?<=[=,\s\"'])/+|(?<=file:)/+|(?<=device:)/+")
"""Where a path begins in the middle of a text."""


class Places:
    """Names as they are in the recording (`there`), and as clients see them (`here`), below `folder`."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def here(self, value: Any) -> Any:
        """A value of JSON for a client."""
        if isinstance(value, str):
            return self.name(value)
        if isinstance(value, list):
            return [self.here(one) for one in value]
        if isinstance(value, dict):
            return {key: self.here(one) for key, one in value.items()}
        return value

    def there(self, value: Any) -> Any:
        """A value of JSON that a client has sent."""
        if isinstance(value, str):
            return value.replace(self._folder, "")
        if isinstance(value, list):
            return [self.there(one) for one in value]
        if isinstance(value, dict):
            return {key: self.there(one) for key, one in value.items()}
        return value

    def name(self, text: str) -> str:
        """What a text is here that is a path, or has some in it. No path leads up out of the folder."""
        if "/" not in text and "unix:" not in text:
            return text
        if text.startswith("/"):
            return text if _QOM.fullmatch(text) else self._folder + os.path.normpath(f"/{text.lstrip('/')}")
        if text.startswith("json:"):
            try:
                return f"json:{json.dumps(self.here(json.loads(text.removeprefix('json:'))))}"
            except ValueError:
                pass
        text = _SOCKET.sub(lambda found: f"unix:{self._folder}/", text)
        return _INSIDE.sub(lambda found: f"{self._folder}/", text)
