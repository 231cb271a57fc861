"""What became of tries to kill a command: counts, a table of them, and a log."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Counts:
    """Of one fault: how many points there are, were tried and survived; how the others were lost."""

    points: int = 0
    tried: int = 0
    survived: int = 0
    lost: list[str] = field(default_factory=list)
    unreached: int = 0  # tries in which the command made fewer changes than in the count


def table(found: dict[str, dict[str, Counts]]) -> str:
    """Counts as Markdown, and below it what was lost."""
    lines = ["| command | fault | points | tried | survived | lost |", "|---|---|---:|---:|---:|---:|"]
    rows = [(job, fault, counts) for job, row in found.items() for fault, counts in row.items()]
    for job, fault, c in rows:
        lines.append(f"| {job} | {fault} | {c.points} | {c.tried} | {c.survived} | {len(c.lost)} |")
    tried, survived = sum(c.tried for *_, c in rows), sum(c.survived for *_, c in rows)
    lines.append(f"| all | | {sum(c.points for *_, c in rows)} | {tried} | {survived} | {tried - survived} |")
    return "\n".join([*lines, "", *(f"{job}: {line}" for job, _, c in rows for line in c.lost)])


class Log:
    """What became of each try of one job, kept in a file if there is one."""

    def __init__(self, file: Path | None, job: str) -> None:
        self.file, self.job = file, job
        self.known: dict[str, tuple[str | None, bool]] = {}
        if file is not None and file.exists():
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            self.known = {name: (lost, reached) for whose, name, lost, reached in lines if whose == job}

    def add(self, name: str, lost: str | None, reached: bool) -> None:
        self.known[name] = (lost, reached)
        if self.file is not None:
            with self.file.open("a") as opened:
                opened.write(json.dumps([self.job, name, lost, reached]) + "\n")
