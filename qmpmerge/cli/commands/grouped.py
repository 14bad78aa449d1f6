"""Help whose options stand in groups, the same ones in the same order for every command."""

from collections.abc import Iterable, Iterator

import click

GROUPS: dict[str, tuple[str, ...]] = {
    "What is merged": ("--base", "--top", "--shallow"),
    "How it ends": ("--pivot", "--keep-overlay", "--wait-ready", "--merged-files"),
    "Safety": ("--dry-run", "--yes", "--verify", "--no-verify", "--no-pause", "--search", "--force"),
    "Waiting": ("--speed", "--converge", "--converge-pause", "--timeout", "--detach", "--polite"),
    "Images not in use (TARGET is an image)": ("--allow", "--format", "--secret"),
    "Output": ("--json", "--quiet", "--verbose", "--help"),
}
"""What stands in none comes first."""

FEW = 7
"""So many options need no groups, only their order."""


_HYPHEN = "\u2011"
"""One at which no line is broken."""


class Formatter(click.HelpFormatter):
    """Breaks no line at a hyphen: `in-use` and `--dry-run` are typed as they are shown."""

    def write_text(self, text: str) -> None:
        """As click does."""
        super().write_text(text.replace("-", _HYPHEN))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """As click does."""
        super().write_dl([(label, text.replace("-", _HYPHEN)) for label, text in rows], col_max, col_spacing)

    def write(self, string: str) -> None:
        """All of it comes through here."""
        super().write(string.replace(_HYPHEN, "-"))


class Grouped(click.Command):
    """A command whose `--help` shows its options like that, all descriptions in one column."""

    def get_help(self, ctx: click.Context) -> str:
        """What `--help` prints."""
        formatter = Formatter(width=ctx.terminal_width, max_width=ctx.max_content_width)
        self.format_help(ctx, formatter)
        return formatter.getvalue().rstrip("\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """In place of click's one list."""
        groups = list(self.groups(ctx))
        rows = [[record for option in options if (record := option.get_help_record(ctx))] for _, options in groups]
        width = max(len(label) for records in rows for label, _ in records)
        for (title, _), records in zip(groups, rows, strict=True):
            with formatter.section(title):
                formatter.write_dl([(label.ljust(width), text) for label, text in records])

    def groups(self, ctx: click.Context) -> Iterator[tuple[str, list[click.Option]]]:
        """Title and options of each group that has any; hidden options are in none."""
        shown = [one for one in self.get_params(ctx) if isinstance(one, click.Option) and not one.hidden]
        parts = [(title, list(_named(shown, names))) for title, names in GROUPS.items()]
        grouped = [option for _, options in parts for option in options]
        parts.insert(0, ("Options", [option for option in shown if option not in grouped]))
        if len(shown) <= FEW:
            parts = [("Options", [option for _, options in parts for option in options])]
        yield from ((title, options) for title, options in parts if options)


def _named(options: list[click.Option], names: tuple[str, ...]) -> Iterator[click.Option]:
    for name in names:
        yield from (option for option in options if name in option.opts)
