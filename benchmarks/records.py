"""Results that several processes of a benchmark add to, one file for all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock


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
