"""The house's measures: what a newcomer can read in one go."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "crosslevel").rglob("*.py"))
LINES, FUNCTION, FOLDER = 350, 60, 12


def body(node):
    """The lines of a function's statements: a signature that is a command line, and what it says, are its manual."""
    told = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return node.body[-1].end_lineno - told[0].lineno + 1 if told else 0


def test_no_folder_has_more_than_twelve_files():
    for folder in {file.parent for file in FILES}:
        files = [file.name for file in folder.glob("*.py") if file.name != "__init__.py"]
        assert len(files) <= FOLDER, folder


@pytest.mark.parametrize("folder", ["crosslevel", "examples"])
def test_no_file_and_no_function_is_too_long(folder):
    too_long = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        text = file.read_text()
        length = text.count("\n")
        if length > LINES:
            too_long.append(f"{file.relative_to(ROOT)}: {length} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and body(node) > FUNCTION:
                too_long.append(f"{file.relative_to(ROOT)}: {node.name} has {body(node)} lines")
    assert not too_long


def test_no_file_of_tests_or_benchmarks_is_too_long():
    files = [file for folder in ("tests", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    assert not [str(file.relative_to(ROOT)) for file in files if file.read_text().count("\n") > LINES]
