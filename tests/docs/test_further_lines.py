"""Every command on the pages after the first is run, in their order, in one user's folder."""

import pytest
from line_runs import cases, check


@pytest.mark.parametrize("words", cases(first=False))
def test_a_line_runs_and_leaves_what_it_says(words, outside, capsys, monkeypatch, request):
    if any("s3://" in word for word in words):
        request.getfixturevalue("store")
    check(words, outside, capsys, monkeypatch)
