"""A stranger: a pickle that runs code, a folder in which that would be seen, and a command that refuses."""

import json
import os
import pickle
import sys

import pytest
from PIL import Image

from crosslevel.settings.parser import run

TINY = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--epochs=1", "--device=cpu"]
TINY += ["--report_html=false", "--monitor_every=0", "--workers=0", "--precision=fp32"]


class Evil:
    """Its pickle touches the canary when it is read."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


class Scene:
    """A folder of images, files of a stranger, and what must be as it was afterwards."""

    def __init__(self, folder):
        sys.modules.pop("stranger", None)  # of a test that failed
        self.folder, self.canary, self.victim = folder, folder / "CANARY", folder / "victim"
        self.victim.write_text("here")
        (folder / "stranger.py").write_text(f"open({str(self.canary)!r}, 'w').close()\nclass Method: pass\n")
        (folder / "evil.pkl").write_bytes(pickle.dumps(Evil(self.canary)))
        (folder / "photos").mkdir()
        for i in range(16):
            Image.new("RGB", (16, 16), (16 * i, 90, 40)).save(folder / "photos" / f"{i}.png")
        self.before = set(os.listdir(folder)) | {"r", "config.yaml", "runs", "t"}

    def filled(self, arguments):
        places = {"c": self.canary, "v": self.victim, "s": self.folder / "stranger.py", "d": self.folder}
        places |= {"p": self.folder / "evil.pkl"}
        text = json.dumps(arguments)
        for name, path in places.items():
            text = text.replace(f"{{{name}}}", str(path))
        return json.loads(text)

    def untouched(self):
        assert not self.canary.exists()
        assert self.victim.read_text() == "here"
        assert set(os.listdir(self.folder)) <= self.before
        assert "stranger" not in sys.modules


def refused(function, arguments, capsys, **more):
    """The one line with which a command refuses what it is given; ``more`` is what has no option."""
    return ended(lambda: run(function, arguments, **more), capsys)


def ended(call, capsys):
    """The one line with which a call of a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1), said
    return said
