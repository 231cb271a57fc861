"""What benchmarks share: a command line, a call of themselves in another process, one file of results for several."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock


def options(about: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark, whose help is its docstring as it stands."""
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def measuring(about: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark that makes its files in a `folder`, and measures each in a process of its own."""
    parser = options(about)
    parser.add_argument("--where", default=None, help="a folder to make the files in, removed at the end")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser


@contextmanager
def folder(where: str | None = None) -> Iterator[Path]:
    """A folder for a benchmark's files, removed at the end."""
    with tempfile.TemporaryDirectory(dir=where, ignore_cleanup_errors=True) as name:
        yield Path(name)


def again(file: str, *words: str, environment: Mapping[str, str] | None = None, show: bool = False) -> str:
    """The output of the same program with other arguments, in a process of its own: memory and time are its alone.

    With ``show`` the output goes to the terminal at once, and nothing is returned.
    """
    line, variables = [sys.executable, file, *words], None if environment is None else {**os.environ, **environment}
    out = None if show else subprocess.PIPE
    return subprocess.run(line, env=variables, check=True, stdout=out, text=True).stdout or ""


def read(record: Path, key: str) -> dict[str, Any]:
    """The entries of the file under ``key``; none where there is no file."""
    entries: dict[str, Any] = json.loads(record.read_text()).get(key, {}) if record.exists() else {}
    return entries


def add(record: Path, key: str, name: str, value: Any, about: dict[str, Any]) -> dict[str, Any]:
    """Add ``value`` as ``name`` under ``key``, keeping what others have added; all of the record, with ``about``."""
    record.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(record.with_suffix(".lock")):
        whole = {**about, key: {**read(record, key), name: value}}
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps(whole, indent=1) + "\n")
        os.replace(temporary, record)
    return whole
