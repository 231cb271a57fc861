"""Every command on the README and the first pages is run, in their order, in one user's folder."""

import re

import pytest
from doc_samples import ROOT
from line_runs import ALONE, ELSEWHERE, LINES, SEVERAL, cases, check

from crosslevel.cli import COMMANDS


@pytest.mark.parametrize("words", cases(first=True))
def test_a_line_runs_and_leaves_what_it_says(words, outside, capsys, monkeypatch):
    check(words, outside, capsys, monkeypatch)


def test_lines_for_several_processes_are_those_that_are_listed_with_a_test():
    alone = {" ".join(words) for words in LINES if set(words) & (set(ALONE) - {"--epoch_size"})}
    assert alone == set(SEVERAL)
    for test in SEVERAL.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text()


def test_every_verb_is_on_a_page_or_run_by_another_test():
    assert set(ELSEWHERE) == set(COMMANDS) - {words[0] for words in LINES}
    for verb, file in ELSEWHERE.items():
        assert re.search(rf"\b{verb}\(|run\({verb}|\"{verb}\"", (ROOT / file).read_text()), verb
