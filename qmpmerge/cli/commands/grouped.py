"""What the commands have in common: help whose options stand in groups, in one order, and what is no value of any."""

from collections.abc import Iterable, Iterator, Mapping

import click

GROUPS: dict[str, tuple[str, ...]] = {
    "What is merged": ("--base", "--top", "--shallow", "--keep", "--all", "--direction"),
    "How it ends": ("--pivot", "--keep-overlay", "--hold", "--merged-files"),
    "Safety": ("--dry-run", "--yes", "--verify", "--no-verify", "--no-pause", "--search", "--force"),
    "Waiting": ("--parallel", "--speed", "--converge", "--converge-pause", "--timeout", "--detach", "--polite"),
    "Images not in use (TARGET is an image)": ("--allow", "--format", "--secret"),
    "Output": ("--dot", "--mermaid", "--json", "--quiet", "--trace", "--record", "--help"),
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

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, but for what is no value."""
        given, _, order = self.make_parser(ctx).parse_args(list(args))
        if not (given.get("help") or ctx.resilient_parsing):
            _refuse_what_is_no_value(ctx, order, given)
        return super().parse_args(ctx, args)

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


def _refuse_what_is_no_value(
    ctx: click.Context, params: Iterable[click.Parameter], given: Mapping[str, object]
) -> None:
    """
    Scripts leave words out: a variable that is not set is an empty word in quotes, and without them an option takes the next
    one for its value, `--json` for one.
    """
    for param in params:
        called = param.opts[0] if isinstance(param, click.Option) else param.human_readable_name.strip("[].")
        value = given.get(param.name or "")
        words = [word for word in (value if isinstance(value, list | tuple) else [value]) if isinstance(word, str)]
        if "" in words:
            raise click.UsageError(f"{called} is empty", ctx)
        option = next((word for word in words if word.startswith("--")), None)
        if option is not None and isinstance(param, click.Option):
            raise click.UsageError(f"{called} has no value: what follows is {option}", ctx)


def _named(options: list[click.Option], names: tuple[str, ...]) -> Iterator[click.Option]:
    for name in names:
        yield from (option for option in options if name in option.opts)
