"""The documentation's programs run as they stand, and its links lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
PROGRAMS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "other-loops.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("program", PROGRAMS, ids=["pytorch", "lightly"])
def test_cld_in_another_loop_runs_as_printed(program):
    if "lightly" in program:
        pytest.importorskip("lightly", reason="needs lightly: pip install lightly")
    seen = {}
    exec(compile(program, "other-loops.md", "exec"), seen)
    assert seen["loss"].isfinite()
    assert seen["cld"].last is not None
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in seen["cld"].parameters())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_published_results_are_what_the_benchmarks_wrote():
    spec = importlib.util.spec_from_file_location("publish", ROOT / "benchmarks" / "shared" / "publish.py")
    publish = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(publish)
    page = (ROOT / "docs" / "results.md").read_text()
    named = set(re.findall(r"<!-- ([\w.-]+\.\w+) -->", page))
    assert named >= {file.name for file in publish.RESULTS.glob("*.txt")}
    assert publish.published(page) == page
    assert publish.published(page.replace("views/s", "frames/s")) == page


def test_the_plan_on_paper_is_what_the_measured_files_make_of_it(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    plan = importlib.import_module("large.scale_plan")
    page = (ROOT / "docs" / "scale.md").read_text()
    assert page.partition("<!-- scale.py --plan 1e9 -->\n")[2].partition("\n<!-- end -->")[0] == "\n".join(
        plan.lines(1e9)
    )
    found = plan.measured()
    assert found.compare == pytest.approx(1137 / 1_000_000)  # of one core, not on the wall
    assert found.decode == pytest.approx((2 / 1133, 4.69e-3))
    rows, twice, priced = plan.rows(1e9, found), plan.rows(2e9, found), plan.lines(1e9, 3)
    cells, assigned = ([row.what for row in rows].index(name) for name in ("cells", "outlines to their cells"))
    assert rows[cells].figure == f"{1e9 / 512:,.0f}"
    assert twice[assigned].gpu == pytest.approx(4 * rows[assigned].gpu)
    assert f"| {3 * rows[-1].gpu:,.0f} |" in priced[-1]


def test_the_readme_shows_measured_figures_alone():
    """Each row of its table is that of docs/claims.md, which the benchmark wrote; and it is short."""
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") < 120
    measured = text.partition("## Measured")[2].partition("\n\n## ")[0]
    claims = (ROOT / "docs" / "claims.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (\d) \| (.+) \|$", measured, re.MULTILINE)
    assert len(rows) >= 6
    for method, seeds, cells in rows:
        (row,) = re.findall(rf"^\| {method.lower()} \| balanced \| {seeds} \| (.+) \|$", claims, re.MULTILINE)
        rounded = [" ± ".join(f"{float(n):.1f}" for n in cell.strip("+").split(" ± ")) for cell in row.split(" | ")]
        assert cells.replace("+", "").replace("**", "").split(" | ") == rounded[:3], method
    baselines = set(re.findall(r"^\| \w+ \| balanced .*\| (\S+) \| \S+ \|$", claims, re.MULTILINE))
    assert {f"{float(pixels):.1f} %" for pixels in baselines} == set(re.findall(r"raw pixels ([\d.]+ %)", measured))
    assert (ROOT / "docs" / "demo.webp").stat().st_size < 150_000
