"""A module imports only from lower rows."""

import ast
from pathlib import Path

import qmpmerge

ROWS = (
    {"errors", "lastwill", "shield", "guard", "patience"},
    {"chain", "commandline", "findings", "qcow2"},
    {
        "files",
        "plan",
        "qemuimg",
        "monitor",
        "processes",
        "diskwalk",
        "agent",
        "backingnames",
        "permissions",
        "shortage",
    },
    {"turns"},
    {
        "jobs",
        "headers",
        "deadman",
        "durable",
        "locks",
        "guardian",
        "dependents",
        "storagedaemon",
        "space",
    },
    {"servers"},
    {"comparison", "pausing", "witness", "blockgraph", "quiesce", "outcome", "rates"},
    {"hosts", "leftovers", "disposal", "bitmaps", "knownbad", "throttle"},
    {"doors.live", "doors.offline", "cleaning"},
    {"doors"},
    {"converge", "stuck"},
    {"checks.question", "evidence", "steps", "doctor"},
    {"checks.said", "checks.files", "diskdoctor"},
    {"checks"},
    {"account", "recovery", "adopting"},
    {"pivot", "sessions"},
    {"switch"},
    {"course", "snapshots"},
    {"merge"},
    {"verbs"},
    {"cli.words"},
    {"cli.output", "cli.text_output", "cli.json_output"},
    {"cli.options", "cli.completing"},
    {"cli.running"},
    {"cli.commands"},
    {"cli"},
    {"__main__"},
)
PACKAGE = Path(qmpmerge.__file__).parent


def test_a_module_imports_only_from_lower_rows() -> None:
    row = {name: number for number, names in enumerate(ROWS) for name in names}
    files = {
        ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
        for file in PACKAGE.rglob("*.py")
    }
    files.pop("__init__")
    assert set(files) == set(row)
    upward = [
        (name, imported)
        for name, file in files.items()
        for imported in imports(file)
        if imported in row and row[imported] >= row[name]
    ]
    assert not upward


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qmpmerge":
            module = (node.module or "").removeprefix("qmpmerge").removeprefix(".")
            for alias in node.names:
                inside = f"{module}.{alias.name}".removeprefix(".")
                found.add(inside if (PACKAGE / inside.replace(".", "/")).with_suffix(".py").exists() else module)
    return found
