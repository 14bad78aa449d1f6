"""Options: each where it is heeded, and nowhere else."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
from rig.command import attempt, invoke

from qmpmerge.cli.commands.group import FILES, cli
from qmpmerge.cli.commands.job import VERBS
from qmpmerge.errors import FORCEABLE


def options_of(name: str) -> dict[str, click.Option]:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return {
        option: parameter
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
    }


# --- what each command offers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_only_what_is_heeded_can_be_forced(name: str) -> None:
    heeded = {
        **dict.fromkeys(("disks", "chain", "graph", "jobs", "job", "doctor"), ("libvirt",)),
        "snapshot": ("in-use", "libvirt"),
        **dict.fromkeys(("plan", "commit", "pull", "tidy"), FORCEABLE),
    }
    force = options_of(name).get("--force")
    offered = None if force is None else tuple(force.type.choices)  # type: ignore[attr-defined]
    assert offered == heeded.get(name)


@pytest.mark.parametrize("name", FILES)
def test_only_who_follows_a_job_has_a_time_limit(name: str) -> None:
    assert ("--timeout" in options_of(name)) == (name in ("commit", "pull", "job", "tidy"))


# --- what does not go together, or is of no use -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--shallow", "--base", "[1]"],
        ["--keep", "0", "--top", "[2]"],
        ["--keep", "1", "--shallow"],
        ["--keep", "1", "--active"],
        ["--pivot", "--keep-overlay"],
        ["--keep-overlay", "--hold"],
        ["--verify", "--no-verify"],
        ["--detach", "--converge"],
        ["--detach", "--converge-pause", "2s"],
        ["--polite", "--converge"],
    ],
)
def test_opposites_are_a_usage_error(words: list[str], tmp_path: Path) -> None:
    told = attempt("commit", "nobody", *words, cwd=tmp_path)
    assert (told.code, "cannot be used together" in told.err) == (2, True), told.err


OF_JOB = {
    **dict.fromkeys(("pivot", "keep_overlay", "hold", "no_pause", "polite", "converge"), ()),
    "merged_files": ("delete",),
    "timeout": ("1m",),
    "converge_pause": ("2s",),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", OF_JOB)
def test_an_option_that_a_verb_does_not_heed_is_a_usage_error(verb: str, name: str, tmp_path: Path) -> None:
    """One that it heeds is not: nobody of that name runs."""
    option = f"--{name.replace('_', '-')}"
    words = ["job", "nobody", "x", verb, *(["1"] if verb == "speed" else []), option, *OF_JOB[name]]
    told = attempt(*words, cwd=tmp_path)
    ignored = f"`{verb}` has no use for {option}" in told.err
    assert (told.code, ignored) == ((4, False) if name in VERBS[verb] else (2, True)), told.err


def test_every_option_of_a_verb_is_there() -> None:
    assert {option for options in VERBS.values() for option in options} == set(OF_JOB)
    assert {f"--{name.replace('_', '-')}" for name in OF_JOB} <= set(options_of("job"))


@pytest.mark.parametrize("name", ["chain", "commit", "doctor", "recover"])
def test_a_place_that_is_not_there_is_not_allowed_silently(name: str, images: list[Path]) -> None:
    told = invoke(name, str(images[3]), "--allow", "/nonexistent")
    assert (told.code, "/nonexistent" in told.err) == (2, True)


def test_the_commands_declare_themselves_where_the_types_of_click_are_not_generic() -> None:
    """As in click 8.1, which Debian 12 and 13 have."""
    files = sorted(set(FILES.values()))
    program = "import click, importlib\nclick.ParamType.__class_getitem__ = None\n" + "".join(
        f"import qmpmerge.cli.commands.{file}\n" for file in files
    )
    subprocess.run([sys.executable, "-c", program], check=True)
