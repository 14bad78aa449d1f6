"""What is installed below share/, kept in docs/share/: manual pages, and a file for each shell that completes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from click.testing import CliRunner

from pages import man
from qmpmerge.cli.commands.group import FILES, cli

SHARE = Path(__file__).parents[2] / "docs" / "share"


def completion(shell: str) -> str:
    """What `qmpmerge completion` prints."""
    return CliRunner().invoke(cli, ["completion", shell]).stdout


SHARED: dict[str, Callable[[], str]] = {
    "man/man1/qmpmerge.1": man.overview,
    **{f"man/man1/qmpmerge-{name}.1": partial(man.page, name) for name in FILES},
    "bash-completion/completions/qmpmerge": partial(completion, "bash"),
    "zsh/site-functions/_qmpmerge": partial(completion, "zsh"),
    "fish/vendor_completions.d/qmpmerge.fish": partial(completion, "fish"),
}
"""Each file by its place in share/, and what makes its text."""


def write() -> None:
    """Write them all."""
    for name, text in SHARED.items():
        (SHARE / name).parent.mkdir(parents=True, exist_ok=True)
        (SHARE / name).write_text(text())
