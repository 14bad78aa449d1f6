"""The `qmpmerge` command with little patience: it waits two seconds for a reply, not a minute."""

import sys

from qmpmerge.cli import main
from qmpmerge.qemu.monitor import Monitor

SECONDS = 2.0

if __name__ == "__main__":
    assert Monitor.execute.__kwdefaults__ is not None
    Monitor.execute.__kwdefaults__["timeout"] = SECONDS
    sys.argv[0] = "qmpmerge"
    main()
