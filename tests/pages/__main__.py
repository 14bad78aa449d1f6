"""``python -m pages``: write them all."""

from pages import DOCS, PAGES

for name, page in PAGES.items():
    (DOCS / name).write_text(page())
