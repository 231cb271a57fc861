"""The arguments of a function or class, read from its source without importing it, so that help is fast."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from crosslevel.settings.kinds import Choices, Kind, Many, Member

ROOT = Path(__file__).parents[1]
REQUIRED = ...
"""Marks an argument without a default."""

NAMED = "Method"  # parts of this class are chosen by name, and have their own settings
NAMES = ("crosslevel.methods", "METHODS")


@dataclass(frozen=True)
class Option:
    """One setting: ``kind`` is its type; ``help`` is its text in the docstring."""

    name: str
    kind: Kind
    default: Any
    help: str


@dataclass(frozen=True)
class Group:
    """A part with settings of its own.

    ``optional``: the part exists only if requested. ``made_of``: its class, by module and name. ``later``: the command
    receives a factory, and makes the part itself.
    """

    name: str
    options: tuple[Option, ...]
    optional: bool
    help: str
    made_of: tuple[str, str]
    later: bool


@dataclass(frozen=True)
class Choice:
    """A part that is chosen by name."""

    name: str
    help: str


Argument = Option | Group | Choice
Parameter = tuple[str, ast.expr | None, ast.expr | None]  # its name, annotation and default


@dataclass(frozen=True)
class Scope:
    """A Python file, and the meaning of its names."""

    module: str
    tree: ast.Module

    def find(self, name: str) -> tuple[Scope, ast.AST] | None:
        """The definition of ``name``, through imports; None if its file is not read."""
        for node in _statements(self.tree.body):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return self, node
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(t, ast.Name) and t.id == name for t in targets) and node.value is not None:
                    return self, node.value
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        imported = scope(node.module)
                        return None if imported is None else imported.find(alias.name)
        return None


@dataclass(frozen=True)
class Signature:
    """A function's summary, its arguments in their order, and its marks by name."""

    summary: str
    arguments: tuple[Argument, ...]
    hidden: tuple[str, ...]
    marks: dict[str, ast.Call] = field(hash=False)


@cache
def scope(module: str) -> Scope | None:
    """The file of a module: Crosslevel's own without importing its package; others only if they are loaded."""
    if module.split(".", maxsplit=1)[0] == "crosslevel":
        path = ROOT.joinpath(*module.split(".")[1:])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    elif module in sys.modules and (spec := find_spec(module)) is not None and str(spec.origin).endswith(".py"):
        file = Path(str(spec.origin))
    else:
        return None
    return Scope(module, ast.parse(file.read_text(encoding="utf-8")))


@cache
def of_command(module: str, name: str) -> Signature:
    """The signature of a function of a module, by its name."""
    module_scope = scope(module)
    definition = None if module_scope is None else module_scope.find(name)
    if definition is None or not isinstance(definition[1], ast.FunctionDef):
        raise LookupError(f"{module} has no function {name}")
    return _of_function(definition[0], definition[1])


def of_function(function: Callable[..., Any]) -> Signature:
    """The signature of any function with a source, also of nested ones."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    node = next(n for n in tree.body if isinstance(n, ast.FunctionDef))
    context = scope(function.__module__) or Scope(function.__module__, tree)
    return _of_function(context, node)


def of_method(path: str) -> tuple[Option, ...]:
    """The options of a method, by its import path: all but the encoder and the number of images."""
    module, _, name = path.rpartition(".")
    module_scope = scope(module)
    definition = None if module_scope is None else module_scope.find(name)
    return () if definition is None else _of_class(*definition, skip=2)


@cache
def methods() -> dict[str, str]:
    """The import paths of Crosslevel's methods, by their names."""
    module_scope = scope(NAMES[0])
    definition = None if module_scope is None else module_scope.find(NAMES[1])
    assert definition is not None
    assert isinstance(definition[1], ast.Dict)
    names = [value.id for value in definition[1].values if isinstance(value, ast.Name)]
    owners = [definition[0].find(name) for name in names]
    return {name: f"{owner[0].module}.{name}" for name, owner in zip(names, owners, strict=True) if owner}


def usual_method() -> str:
    """The name of the default method."""
    module_scope = scope(NAMES[0])
    definition = None if module_scope is None else module_scope.find("USUAL")
    assert definition is not None
    return str(_value(*definition))


def _of_function(context: Scope, node: ast.FunctionDef) -> Signature:
    doc = ast.get_docstring(node) or ""
    helps = _arguments_of(doc)
    arguments = [
        _argument(context, name, annotation, default, helps.get(name, ""))
        for name, annotation, default in _parameters(node.args.args, node.args.defaults)
    ]
    calls = [d for d in node.decorator_list if isinstance(d, ast.Call)]
    marks = {_name(call.func): call for call in calls}
    return Signature(_summary(doc), tuple(arguments), tuple(a.arg for a in node.args.kwonlyargs), marks)


def _of_class(
    context: Scope, node: ast.AST, skip: int = 0, overrides: dict[str, Any] | None = None
) -> tuple[Option, ...]:
    """The options of a class: its constructor's arguments, or its fields and those of its base classes."""
    assert isinstance(node, ast.ClassDef)
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    bases, helps = _bases(context, node), _described(context, node)
    if init is None:
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        options = {o.name: o for base in bases for o in _of_class(*base, skip=skip)}
        listed: list[Parameter] = [(_name(n.target), n.annotation, n.value) for n in fields]
        skip = 0
    else:
        options = {}
        keywords = [d or ast.Constant(REQUIRED) for d in init.args.kw_defaults]
        listed = list(_parameters(init.args.args[1:], init.args.defaults))
        listed += [(a.arg, a.annotation, d) for a, d in zip(init.args.kwonlyargs, keywords, strict=True)]
    for name, annotation, default in listed[skip:]:
        option = _argument(context, name, annotation, default, helps.get(name, ""))
        if isinstance(option, Option):
            options[name] = option
    changed = overrides or {}
    return tuple(
        Option(o.name, o.kind, changed.get(o.name, o.default), helps.get(o.name, o.help)) for o in options.values()
    )


def _bases(context: Scope, node: ast.ClassDef) -> list[tuple[Scope, ast.ClassDef]]:
    """The base classes of a class, if their files are read."""
    definitions = [context.find(_name(base)) for base in node.bases]
    return [
        (definition[0], definition[1])
        for definition in definitions
        if definition is not None and isinstance(definition[1], ast.ClassDef)
    ]


def _described(context: Scope, node: ast.ClassDef) -> dict[str, str]:
    """The help of arguments, from the docstrings of the class, its constructor, its other methods and its bases."""
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    constructor = [n for n in methods if n.name == "__init__"]
    helps: dict[str, str] = {}
    for base in _bases(context, node):
        helps |= _described(*base)
    described: list[ast.FunctionDef | ast.ClassDef] = [n for n in methods if n.name != "__init__"]
    for each in (*described, node, *constructor):
        helps |= _arguments_of(ast.get_docstring(each) or "")
    return helps


def _parameters(arguments: list[ast.arg], defaults: list[ast.expr]) -> Iterator[Parameter]:
    missing: list[ast.expr | None] = [None] * (len(arguments) - len(defaults))
    for argument, default in zip(arguments, [*missing, *defaults], strict=True):
        yield argument.arg, argument.annotation, default


def _argument(context: Scope, name: str, annotation: ast.expr | None, default: ast.expr | None, text: str) -> Argument:
    part = _part(context, annotation)
    if part is None:
        value = REQUIRED if default is None else _value(context, default)
        return Option(name, _kind(context, annotation), value, text)
    (class_scope, node), before = part
    assert isinstance(node, ast.ClassDef)
    if node.name == NAMED:
        return Choice(name, text)
    overrides = (
        {k.arg: _value(context, k.value) for k in default.keywords if k.arg} if isinstance(default, ast.Call) else {}
    )
    options = _of_class(class_scope, node, skip=before or 0, overrides=overrides)
    optional = isinstance(default, ast.Constant) and default.value is None
    return Group(name, options, optional, text, (class_scope.module, node.name), before is not None)


def _part(context: Scope, annotation: ast.expr | None) -> tuple[tuple[Scope, ast.AST], int | None] | None:
    """The class of a part, and how many arguments its factory takes; None if the annotation is no part.

    A part is annotated with its class (the number is then None) or with a factory such as ``Callable[[int], Class]``.
    """
    if isinstance(annotation, ast.BinOp):
        return _part(context, annotation.left) or _part(context, annotation.right)
    if isinstance(annotation, ast.Subscript) and _name(annotation.value) == "Callable":
        assert isinstance(annotation.slice, ast.Tuple)
        takes, gives = annotation.slice.elts
        definition = context.find(_name(gives))
        count = len(takes.elts) if isinstance(takes, ast.List) else 0
    else:
        definition = context.find(_name(annotation)) if annotation is not None else None
        count = None
    return (definition, count) if definition is not None and isinstance(definition[1], ast.ClassDef) else None


def _kind(context: Scope, node: ast.AST | None) -> Kind:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _kind(context, ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.Constant) and node.value is None:
        return ("None",)
    if isinstance(node, ast.BinOp):
        return (*_kind(context, node.left), *_kind(context, node.right))
    if isinstance(node, ast.Subscript):
        return (_of_several(context, node),)
    if isinstance(node, ast.Name) and node.id in ("str", "int", "float", "bool"):
        return (node.id,)
    definition = context.find(_name(node)) if isinstance(node, ast.Name | ast.Attribute) else None
    return ("any",) if definition is None or isinstance(definition[1], ast.ClassDef) else _kind(*definition)


def _of_several(context: Scope, node: ast.Subscript) -> Member:
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    kind = _name(node.value)
    if kind == "Literal":
        return Choices(tuple(str(ast.literal_eval(word)) for word in inner))
    if kind not in ("list", "tuple", "Sequence"):
        return "any"
    variadic = isinstance(inner[-1], ast.Constant) and inner[-1].value is ...
    items = tuple(_kind(context, item) for item in inner[: -1 if variadic else None])
    return Many(items, variadic or kind != "tuple", kind != "tuple")


def _value(context: Scope, node: ast.AST) -> Any:
    """The value of a default; a name is looked up, and a call counts as None."""
    if isinstance(node, ast.Name) and (definition := context.find(node.id)) is not None:
        return _value(*definition)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a file, and those under its ``if``, such as imports for types."""
    for node in body:
        yield from _statements(node.body) if isinstance(node, ast.If) else [node]


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _summary(doc: str) -> str:
    return (
        doc.split("\nArgs:", maxsplit=1)[0].split("\nReturns:", maxsplit=1)[0].split("\nRaises:", maxsplit=1)[0].strip()
    )


def _arguments_of(doc: str) -> dict[str, str]:
    """The lines of the docstring's Args, by argument."""
    texts: dict[str, str] = {}
    for part in re.findall(r"^Args:\n((?:    .*\n?|\n)*)", doc, re.MULTILINE):
        for entry in re.split(r"\n(?=    \S)", part.rstrip()):
            name, _, text = entry.strip().partition(":")
            texts[name] = " ".join(text.split()).replace("``", "")
    return texts
