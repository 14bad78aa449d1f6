"""What `--help` shows: all options, in groups that read well on 80 columns."""

import re

import click
import pytest
from click.testing import CliRunner

from qmpmerge.cli.commands.group import FILES, cli
from qmpmerge.cli.commands.grouped import FEW, GROUPS, Grouped


def shown(*words: str, columns: int = 80) -> str:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(cli, [*words, "--help"], prog_name="qmpmerge").output


def command(name: str) -> Grouped:
    found = cli.get_command(click.Context(cli), name)
    assert isinstance(found, Grouped)
    return found


@pytest.mark.parametrize("words", [(), *((name,) for name in FILES)], ids=lambda words: " ".join(words) or "itself")
def test_help_fits_80_columns(words: tuple[str, ...]) -> None:
    assert [line for line in shown(*words).splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("columns", [60, 80, 100])
def test_no_word_is_broken_at_a_hyphen(name: str, columns: int) -> None:
    """`in-use` in two lines cannot be searched for, nor pasted."""
    assert [line for line in shown(name, columns=columns).splitlines() if re.search(r"\w-$", line)] == []


@pytest.mark.parametrize("name", FILES)
def test_help_has_an_example_and_exit_codes(name: str) -> None:
    text = shown(name)
    assert re.search(rf"^  Examples?:\n(    .*\n)*    .*qmpmerge {name}", text, re.MULTILINE), text
    assert re.search(r"^  Exit codes:\n    0    \w", text, re.MULTILINE), text


@pytest.mark.parametrize("name", FILES)
def test_first_lines_are_shown_whole_in_the_list_of_commands(name: str) -> None:
    text = command(name).get_short_help_str(200).rstrip(".")
    assert re.search(rf"^  {name} +{re.escape(text)}\.$", shown(), re.MULTILINE)


@pytest.mark.parametrize("name", FILES)
def test_no_option_is_left_out_and_descriptions_stand_in_one_column(name: str) -> None:
    context = click.Context(command(name), info_name=name)
    options = [one for one in command(name).get_params(context) if isinstance(one, click.Option) and not one.hidden]
    rows = re.findall(r"^(  (-.*?) {2,})\S", shown(name), re.MULTILINE)
    assert sorted(label for _, label in rows) == sorted((one.get_help_record(context) or ("",))[0] for one in options)
    assert len({len(start) for start, _ in rows}) == 1


@pytest.mark.parametrize("name", FILES)
def test_many_options_stand_in_groups_in_their_order(name: str) -> None:
    context = click.Context(command(name), info_name=name)
    titles = [title for title, _ in command(name).groups(context)]
    shown_options = [
        one for one in command(name).get_params(context) if isinstance(one, click.Option) and not one.hidden
    ]
    few = len(shown_options) <= FEW
    if few:
        assert titles == ["Options"]
    else:
        assert titles == [title for title in ("Options", *GROUPS) if title in titles]


@pytest.mark.parametrize("name", ["commit", "job"])
def test_all_options_of_a_merge_have_a_group(name: str) -> None:
    assert "\nOptions:" not in shown(name)


def test_a_group_names_no_option_twice() -> None:
    names = [name for group in GROUPS.values() for name in group]
    assert len(names) == len(set(names))
