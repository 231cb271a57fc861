"""A fault of this program ends with a traceback, wherever it is: also a ``ValueError`` that is none of ours."""

from functools import wraps

import pytest
import yaml
from run_samples import write_images
from table_samples import write_encoder

from crosslevel.cld.loss import CrossLevel
from crosslevel.data.open import open_images
from crosslevel.data.sources.turntable.dataset import Turntable
from crosslevel.data.sources.video.frames import Pace
from crosslevel.data.subsets.suffixes import SUFFIXES
from crosslevel.models.encoder import Encoder, load_encoder
from crosslevel.runs import Run
from crosslevel.settings.parser import exit_on_error
from crosslevel.training.loop import checkpoints
from crosslevel.utils import files


@pytest.fixture
def home(tmp_path):
    """A folder with images, a video that none decodes, and a run."""
    write_images(tmp_path / "photos", count=4)
    (tmp_path / "a.mp4").touch()
    run = Run(write_encoder(tmp_path / "run"))
    run.config.write_text(yaml.safe_dump({"cld": {"groups": 4}}))
    files.write_tensors(run.cld, CrossLevel(8, groups=4).state_dict())
    run.checkpoints.mkdir()
    run.last.touch()
    return tmp_path


PLACES = {
    "a named source": (Turntable, "__init__", lambda home: open_images("turntable,seed=77")),
    "a part": (SUFFIXES, "frames", lambda home: open_images(f"{home}/photos@frames=2")),
    "a video": (Pace, "__post_init__", lambda home: open_images(f"{home}/a.mp4,fps=2")),
    "an encoder": (Encoder, "__init__", lambda home: load_encoder(home / "run")),
    "a group branch": (CrossLevel, "__init__", lambda home: Run(home / "run").load_cld()),
    "a checkpoint": (checkpoints, "_tree", lambda home: checkpoints.read(Run(home / "run"))),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_bare_value_error_is_no_mistake_of_the_users(place, home, monkeypatch, capsys):
    where, name, call = PLACES[place]

    @wraps(where[name] if isinstance(where, dict) else getattr(where, name))
    def broken(*given, **named):
        raise ValueError("not thought of")

    if isinstance(where, dict):
        monkeypatch.setitem(where, name, broken)
    else:
        monkeypatch.setattr(where, name, broken)
    with pytest.raises(SystemExit) as end, exit_on_error("crosslevel train"):
        call(home)
    said = capsys.readouterr().err
    assert end.value.code == 70
    assert "Traceback" in said
    assert "not thought of: this is a fault of Crosslevel's" in said.splitlines()[-1]
