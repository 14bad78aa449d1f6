"""``python -m pages``: write what is made from the code; with ``--sessions [PAGE...]`` type the others and renew what is seen."""

import sys

from pages import DOCS, PAGES, sessions

if sys.argv[1:2] == ["--sessions"]:
    for name in sys.argv[2:] or sessions.pages():
        sessions.write(name, sessions.renewed(name))
else:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
