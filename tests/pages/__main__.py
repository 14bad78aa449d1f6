"""``python -m pages`` writes what is made from the code; with ``--sessions [PAGE...]`` it types the others and renews them."""

import sys

from pages import DOCS, PAGES, graph, sessions, shared

if sys.argv[1:2] == ["--sessions"]:
    for name in sys.argv[2:] or sessions.pages():
        sessions.write(name, sessions.renewed(name))
else:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
    graph.write()
    shared.write()
