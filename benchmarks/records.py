"""What benchmarks share: their command line, themselves in another process, and one file of results for several."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock


def options(about: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark, whose help is its docstring as it stands."""
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def again(file: str, *words: str, environment: Mapping[str, str] | None = None) -> str:
    """What the same program prints, called with other words in a process of its own: memory and time are its alone."""
    line, own = [sys.executable, file, *words], None if environment is None else {**os.environ, **environment}
    return subprocess.run(line, env=own, check=True, stdout=subprocess.PIPE, text=True).stdout


def read(record: Path, key: str) -> dict[str, Any]:
    """What the file has under ``key``; nothing where there is no file."""
    found: dict[str, Any] = json.loads(record.read_text()).get(key, {}) if record.exists() else {}
    return found


def add(record: Path, key: str, name: str, value: Any, about: dict[str, Any]) -> dict[str, Any]:
    """``value`` as ``name`` under ``key``, beside what others have added meanwhile; all of it, with ``about``."""
    record.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(record.with_suffix(".lock")):
        whole = {**about, key: {**read(record, key), name: value}}
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps(whole, indent=1) + "\n")
        os.replace(temporary, record)
    return whole
