"""Settings that the sizes of tracks suggest."""

import torch

from crosslevel.advice import advise


def test_settings_follow_from_the_tracks():
    alone = {a.setting: a.value for a in advise(torch.ones(1000).long(), torch.ones(1000).long(), 256)}
    assert alone == {"batch_size": 256, "cld.groups": 192, "cld.weight": 0.25, "de-duplicate": "no"}
    films = {a.setting: a.value for a in advise(torch.full((500,), 20), torch.ones(10_000).long(), 256)}
    assert films["batch_size"] < 256
    assert films["cld.groups"] < 0.75 * films["batch_size"]
    many = {a.setting: a.value for a in advise(torch.full((20_000,), 20), torch.ones(400_000).long(), 256)}
    assert many["de-duplicate"] == "one image a track"
    copies = {a.setting: a.value for a in advise(torch.full((500,), 2), torch.full((500,), 2), 32)}
    assert copies["de-duplicate"] == "exact copies"
