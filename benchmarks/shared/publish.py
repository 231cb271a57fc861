"""Copy every file of benchmarks/results into its section of docs/results.md: python benchmarks/shared/publish.py

A section begins with a comment that names the file; its text, up to the end of the block, is replaced.
"""

from __future__ import annotations

import re
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
PAGE = Path(__file__).parents[2] / "docs" / "results.md"
SECTION = re.compile(r"<!-- (?P<name>[\w.-]+) -->\n.*?<!-- end -->", re.DOTALL)


def published(page: str, results: Path = RESULTS) -> str:
    """``page`` with the present text of every file that it names: Markdown as it is, the rest as a code block."""

    def section(match: re.Match[str]) -> str:
        name = match["name"]
        text = (results / name).read_text(encoding="utf-8").strip("\n")
        body = text if name.endswith(".md") else f"```\n{text}\n```"
        return f"<!-- {name} -->\n{body}\n<!-- end -->"

    return SECTION.sub(section, page)


if __name__ == "__main__":
    PAGE.write_text(published(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
