"""A wing imports only from lower rows, no two files import each other, and what is private to a file stays there."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import qmpmerge

ROWS = (
    {"value"},
    {"errors", "folder", "mounts", "shield", "sockets", "users", "watch"},
    {"chain", "given"},
    {"images", "processes"},
    {"qemu"},
    {"guest", "journal"},
    {"targets"},
    {"checks", "recovery", "doctor"},
    {"engine"},
    {"operations"},
    {"recording"},
    {"testing"},
    {"sync"},
    {"cli"},
    {"__main__"},
)
"""The wings, bottom up; in the lowest rows also the files that any wing may use."""

PACKAGE = Path(qmpmerge.__file__).parent
FILES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in PACKAGE.rglob("*.py")
    if file.parent != PACKAGE or file.name != "__init__.py"
}


def imports(name: str) -> Iterator[tuple[str, str]]:
    """The file of ours that is imported, and the name that is taken from it, if one is; not for type checking alone."""
    for node in runtime(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qmpmerge":
            module = (node.module or "").removeprefix("qmpmerge").removeprefix(".")
            for alias in node.names:
                inside = f"{module}.{alias.name}".removeprefix(".")
                yield (inside, "") if inside in FILES else (module, alias.name)
        elif isinstance(node, ast.Import):
            yield from ((alias.name.removeprefix("qmpmerge."), "") for alias in node.names if "qmpmerge." in alias.name)


def runtime(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from runtime(node)


def wing(name: str) -> str:
    return name.split(".")[0]


def test_a_wing_imports_only_from_lower_rows() -> None:
    row = {name: number for number, names in enumerate(ROWS) for name in names}
    assert {wing(name) for name in FILES} == set(row)
    upward = [
        (name, imported)
        for name in FILES
        for imported, _ in imports(name)
        if imported and wing(imported) != wing(name) and row[wing(imported)] >= row[wing(name)]
    ]
    assert not upward


def test_no_files_import_each_other() -> None:
    graph = {name: {imported for imported, _ in imports(name) if imported != name} for name in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(error.args[1])) from None


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_what_is_private_to_a_file_stays_there() -> None:
    crossing = [
        (name, taken) for name in FILES for _, taken in imports(name) if taken.startswith("_") and taken[1] != "_"
    ]
    for name, file in FILES.items():
        tree = ast.parse(file.read_text())
        modules = {imported.rpartition(".")[2] for imported, taken in imports(name) if not taken}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in modules:
                crossing.append((name, ast.unparse(node)))
    assert not crossing


def test_no_test_imports_from_a_test() -> None:
    tests = Path(__file__).parent
    importing = [
        str(file.relative_to(tests))
        for file in tests.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom | ast.Import)
        for module in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        )
        if module.rpartition(".")[2].startswith("test_")
    ]
    assert not importing
