"""Settings that the sizes of tracks suggest."""

import contextlib
import io
import re

import pytest
import torch
import yaml

from crosslevel.inspection.recommend import advise
from crosslevel.settings.parser import run
from crosslevel.training.train import train
from crosslevel.tuning import search_space as ranges


def reasons(tracks, batch_size):
    return {a.setting: a.reason for a in advise(tracks, torch.ones(int(tracks.sum())).long(), batch_size)}


def test_settings_follow_from_the_tracks():
    alone = {a.setting: a.value for a in advise(torch.ones(1000).long(), torch.ones(1000).long(), 256)}
    assert alone == {"batch_size": 256, "cld.groups": 192, "cld.weight": 0.25, "de-duplicate": "no"}
    films = {a.setting: a.value for a in advise(torch.full((500,), 20), torch.ones(10_000).long(), 256)}
    assert films["batch_size"] < 256
    assert films["cld.groups"] < 0.75 * films["batch_size"]
    many = {a.setting: a.value for a in advise(torch.full((20_000,), 20), torch.ones(400_000).long(), 256)}
    assert many["de-duplicate"] == "one image a track"
    copies = {a.setting: a.value for a in advise(torch.full((500,), 2), torch.full((500,), 2), 32)}
    assert copies["de-duplicate"] == "copies"


@pytest.mark.parametrize("count", [2, 3, 31, 48, 255, 256])
def test_no_batch_is_larger_than_the_collection(count):
    found = {a.setting: a for a in advise(torch.ones(count).long(), torch.ones(count).long(), 256)}
    assert found["batch_size"].value <= count
    assert found["batch_size"].value > count / 2
    assert found["cld.groups"].value <= max(2, count)
    if count < 256:
        assert f"{count} images were compared" in found["batch_size"].reason


def test_reasons_say_whose_rule_it_is_and_what_speaks_against_it():
    alone, films = reasons(torch.ones(1000).long(), 256), reasons(torch.full((500,), 20), 256)
    assert "authors advise many groups" in alone["cld.groups"]
    assert "conflicts" not in alone["cld.groups"]
    assert "authors advise fewer groups the more correlated" in films["cld.groups"]
    assert "few groups were worse than many" in films["cld.groups"]
    assert "not measured" in films["batch_size"]


def test_the_search_that_settles_it_is_one_that_tune_takes():
    tracks = torch.full((500,), 20)
    batch = next(a.value for a in advise(tracks, torch.ones(10_000).long(), 256) if a.setting == "batch_size")
    found = re.search(r"crosslevel tune IMAGES --batch_size (\d+) --search (\S+)$", reasons(tracks, 256)["cld.groups"])
    assert int(found[1]) == batch
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.raises(SystemExit):
        run(train, ["photos", f"--batch_size={batch}", "--print_config"])
    searched = ranges.parse([found[2]], yaml.safe_load(told.getvalue()))
    assert searched == {"cld.groups": ranges.Numbers(batch // 8, 3 * batch // 4, log=True, integral=True)}
