"""``python -m qmpmerge``."""

from qmpmerge.cli import main

main()
