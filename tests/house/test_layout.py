"""The house's measures: what a newcomer can read in one go."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "crosslevel").rglob("*.py"))
LINES, FUNCTION, FOLDER = 350, 60, 12
PATCHED = 26  # attributes of Crosslevel's own that tests replace; it may only fall
PRIVATE = 13  # names of Crosslevel's own with a leading underscore that tests read or call; it may only fall
"""What is left stands for a fault or for what nobody should see: a lock that is held, a cache's content, a decoder that
crashes, the file of the machine's slots of memory."""
THEIRS = {"_compiled_call_impl", "_parameters"}  # PyTorch's, of which Crosslevel has namesakes
INSTEAD = (
    "give the function or class a keyword parameter with the constant as its default, and hand the test's value in; or "
    "make a real fault: a file that cannot be read, a quota, an object handed in that fails or counts"
)


@functools.cache
def parsed(file):
    return ast.parse(file.read_text())


def lines(node):
    """All lines of a function but those of its docstring: decorators, signature, blank lines and comments as well.

    Of a verb the signature is the command line, and is not counted.
    """
    marks = {getattr(getattr(mark, "func", mark), "id", "") for mark in node.decorator_list}
    said = ast.get_docstring(node) is not None
    if "verb" in marks:
        first = node.body[0].end_lineno + 1 if said else node.body[0].lineno
        return node.end_lineno - first + 1
    first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
    return node.end_lineno - first + 1 - (node.body[0].end_lineno - node.body[0].lineno + 1 if said else 0)


VAGUE = {
    "about": ("metadata", 1),
    "apart": ("distance, gap, or what is split", 0),
    "asked": ("requested, queries", 0),
    "began": ("start_time", 0),
    "begun": ("started", 0),
    "beside": ("second, baselines, reference", 3),
    "both": ("pair, joined", 0),
    "chosen": ("selected, indices, mask", 3),
    "drawn": ("sampled, parameters", 0),
    "ending": ("extension, suffix", 0),
    "everyone": ("gathered", 0),
    "everything": ("all_images, or all of what", 0),
    "found": ("matches, result, indices", 0),
    "given": ("settings, value, options", 0),
    "gone": ("removed, missing", 0),
    "held": ("held_out, buffer, current", 0),
    "home": ("run_dir, folder", 0),
    "kept": ("cached, mask, selected", 0),
    "known": ("existing, cached, choices", 2),
    "looked": ("scanned, result", 0),
    "looks": ("findings", 0),
    "made": ("result, image, array", 0),
    "members": ("indices, rows, entries", 2),
    "mine": ("own, local, shard", 0),
    "named": ("names, by_name, columns", 1),
    "others": ("remaining, baselines, rest of what", 1),
    "own": ("first, local, source", 0),
    "parts": ("chunks, sections, components", 5),
    "place": ("offset, index, position, path, device", 0),
    "places": ("offsets, indices, positions", 0),
    "said": ("message, output", 0),
    "seen": ("visited, finite, features", 0),
    "shown": ("displayed, selected, images", 0),
    "some": ("sample, subset, chunk", 0),
    "taken": ("used, selected", 0),
    "theirs": ("reference, stored", 0),
    "there": ("available, existing, present, path", 0),
    "told": ("message, yielded, status", 0),
    "tried": ("candidates", 0),
    "usual": ("default", 0),
    "wanted": ("requested, target, expected", 0),
    "what": ("kind, description, or the thing itself", 0),
    "whole": ("complete, full, unsharded", 0),
    "why": ("reason", 0),
}
"""Names that say nothing: what to say instead, and how many bindings are left. A number may only fall."""


NAMES = dict.fromkeys((ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler, ast.MatchAs), "name")
NAMES |= {ast.Name: "id", ast.Attribute: "attr", ast.arg: "arg", ast.alias: "asname"}


def bindings(tree):
    """Name and line of all that a file names: variables, arguments, attributes, functions, classes and imports."""
    for node in ast.walk(tree):
        field = NAMES.get(type(node))
        if field and not isinstance(getattr(node, "ctx", None), ast.Load) and (name := getattr(node, field)):
            yield name, node.lineno


def test_names_are_the_fields_words():
    """A bare name such as ``found`` says that something was found, and not what it is."""
    uses = {word: [] for word in VAGUE}
    for file in FILES:
        for name, line in bindings(parsed(file)):
            if not name.isupper() and (word := name.strip("_").lower()) in VAGUE:
                uses[word].append(f"{file.relative_to(ROOT)}:{line}")
    for word, (better, budget) in VAGUE.items():
        count = len(uses[word])
        assert count <= budget, f"{word!r} says nothing: say {better}, at one of {', '.join(uses[word])}"
        assert count == budget, f"{word!r} is left {count} times: lower its number from {budget}"


def test_no_folder_has_more_than_twelve_files():
    outside = [file for folder in ("tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    for folder in {file.parent for file in [*FILES, *outside]}:
        assert len(list(folder.glob("*.py"))) <= FOLDER, folder
    for folder in {file.parent for file in (ROOT / "crosslevel").rglob("*.yaml")}:
        assert len(list(folder.glob("*.yaml"))) <= FOLDER, folder


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("difflib", "utils/errors.py"),
        ("SeedSequence", "utils/rng.py"),
        ("BarColumn", "utils/console.py"),
        ('"x+b"', "utils/files.py"),
        ("deque[Future", "data/loaders/prefetch.py"),
        ("Generator().manual_seed(", "utils/rng.py"),
        ("raise the queue", "methods/moco.py"),
        ("queries_and_keys(", "training/monitor.py"),
        ("images.left_out", "data/images.py"),
        ('"config.yaml"', "utils/files.py"),
        ('"metrics.csv"', "utils/files.py"),
        ('"bad_files.txt"', "utils/files.py"),
        ('"encoder.safetensors"', "utils/files.py"),
        ('"last.ckpt"', "utils/files.py"),
        ('"kept.safetensors"', "utils/files.py"),
        ('"loggers.json"', "utils/files.py"),
    ],
)
def test_what_many_need_is_written_once(name, home):
    """Nearest names, seeds, bars of progress, files that are whole or not there, what a run's files are called."""
    assert [file for file in FILES if name in file.read_text()] == [ROOT / "crosslevel" / home]


@pytest.mark.parametrize("folder", ["crosslevel", "examples"])
def test_no_file_and_no_function_is_too_long(folder):
    too_long = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        text = file.read_text()
        length = text.count("\n")
        if length > LINES:
            too_long.append(f"{file.relative_to(ROOT)}: {length} lines")
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines(node) > FUNCTION:
                too_long.append(f"{file.relative_to(ROOT)}: {node.name} has {lines(node)} lines")
    assert not too_long


def test_no_page_style_or_script_is_too_long():
    files = [file for end in ("html", "jinja", "css", "js") for file in (ROOT / "crosslevel").rglob(f"*.{end}")]
    assert {file.suffix for file in files} == {".html", ".jinja", ".css", ".js"}
    assert not [str(file.relative_to(ROOT)) for file in files if file.read_text().count("\n") > LINES]


def test_no_file_of_tests_or_benchmarks_is_too_long():
    files = [file for folder in ("tests", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    assert not [str(file.relative_to(ROOT)) for file in files if file.read_text().count("\n") > LINES]


def patched(file):
    """Where a file of tests replaces what is of Crosslevel's modules and classes, by pytest, mock or assignment."""
    tree, found = ast.parse(file.read_text()), []
    ours = {
        name.asname or name.name.partition(".")[0]
        for node in ast.walk(tree)
        for name in getattr(node, "names", [])
        if isinstance(node, ast.Import | ast.ImportFrom)
        if (getattr(node, "module", None) or name.name).partition(".")[0] == "crosslevel"
    }
    for node in ast.walk(tree):
        targets = [target for target in getattr(node, "targets", []) if isinstance(target, ast.Attribute)]
        called = isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called in ("setattr", "delattr", "setitem", "delitem", "patch", "object"):
            targets = node.args[:1]
        for target in targets:
            text = ast.unparse(target)
            own = re.match(r"[\w.]+$", text) and text.partition(".")[0] in ours
            if own or re.match("f?['\"]crosslevel[.]", text):
                found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {text}")
    return found


def test_tests_go_in_by_the_doors():
    """Nobody may rename what tests patch; what they hand in is a part of what a function promises."""
    found = [where for file in sorted((ROOT / "tests").rglob("*.py")) for where in patched(file)]
    told = "\n".join(found)
    assert len(found) <= PATCHED, f"{len(found)} patches, {PATCHED} were left: {INSTEAD}\n{told}"


@functools.cache
def private_names():
    """What Crosslevel defines with a leading underscore: functions, classes, constants and attributes."""
    names = {name for file in FILES for name, _ in bindings(parsed(file))}
    return {name for name in names if re.match("_[A-Za-z]", name)} - THEIRS


def private_uses(file):
    """Where a file of tests imports such a name, or takes it from anything but its own ``self``."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("crosslevel"):
            used = [name.name for name in node.names if name.name.startswith("_")]
        elif isinstance(node, ast.Attribute) and node.attr in private_names():
            used = [ast.unparse(node)] if ast.unparse(node.value) not in ("self", "cls") else []
        else:
            continue
        yield from (f"{file.relative_to(ROOT)}:{node.lineno}: {name}" for name in used)


def test_tests_use_no_private_names():
    """What is worth a test of its own is public, and says what it takes and returns."""
    uses = [where for file in sorted((ROOT / "tests").rglob("*.py")) for where in private_uses(file)]
    listed = "\n".join(uses)
    assert len(uses) <= PRIVATE, f"{len(uses)} private names, {PRIVATE} were left: test by a public one\n{listed}"
    assert len(uses) == PRIVATE, f"{len(uses)} private names are left: lower PRIVATE from {PRIVATE}\n{listed}"


def test_the_architecture_is_one_page_with_one_picture():
    """At 300 words a minute, and a few seconds for the picture."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    text, picture, rest = page.partition("```mermaid")[0], page.count("```mermaid"), page.rpartition("```")[2]
    assert picture == 1
    assert len((text + rest).split()) < 300
    for name in re.findall(r"`([a-z_/]+\.py)`", rest):
        assert any(str(file).endswith(f"/{name}") for file in FILES), name
