"""Loggers by name and as objects, and callbacks: they hear what metrics.csv has, and none can end a training."""

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from run_samples import metrics, write_images

import crosslevel
from crosslevel.training.loop.log import COLUMNS
from crosslevel.training.loop.loggers import logger_names
from crosslevel.utils.errors import MissingExtra, UserError

SMALL = {
    "encoder": {"width": 0.0625}, "views": {"size": 16}, "cld": {"groups": 4}, "batch_size": 8, "device": "cpu",
    "workers": 0, "report_html": False, "quiet": True, "log_every": 1, "epochs": 1, "monitor_every": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos"), count=8)


class Recorder:
    def __init__(self, broken=None):
        self.rows, self.settings, self.ends, self.broken = {}, {}, [], broken

    def log_hyperparams(self, settings):
        self.settings = settings

    def log_metrics(self, values, step):
        if step == self.broken:
            raise ConnectionError("the server is gone")
        self.rows.setdefault(step, {}).update(values)

    def finalize(self, status):
        self.ends.append(status)


class Callbacks:
    def __init__(self):
        self.heard = []

    def on_train_start(self, run, module):
        self.heard.append(("start", run, module.step))

    def on_log(self, step, figures, module):
        assert step == module.step
        self.heard.append(("log", step, sorted(figures)))

    def on_train_end(self, run, module):
        self.heard.append(("end", run, module.step))


class Nothing:
    """Has no method that is called."""


def test_objects_hear_what_the_file_has_and_callbacks_their_part(photos, tmp_path):
    sound, broken, calls = Recorder(), Recorder(broken=2), Callbacks()
    with pytest.warns(UserWarning, match="Recorder gets no figures from here on: the server is gone"):
        run = crosslevel.train(
            photos, run=tmp_path / "r", logger="csv", loggers=[broken, sound], callbacks=[calls, Nothing()], **SMALL
        )
    rows = metrics(run)
    assert set(sound.rows) == {int(row["step"]) for row in rows} == {1, 2}
    for row in rows:
        for name, value in sound.rows[int(row["step"])].items():
            if name in COLUMNS:
                assert float(row[name]) == pytest.approx(value, rel=1e-4)
    assert sound.ends == ["success"]
    assert (list(broken.rows), broken.ends) == ([1], [])
    assert (sound.settings["batch_size"], sound.settings["encoder.width"]) == (8, 0.0625)
    assert [heard[0] for heard in calls.heard] == ["start", "log", "log", "end"]
    assert calls.heard[0][1:] == (run, 0)
    assert calls.heard[-1][1:] == (run, 2)
    assert not (run / "tensorboard").exists()


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning_fabric"])
def test_lightnings_own_logger_has_the_rows_of_the_file(package, photos, tmp_path):
    """Fabric's takes no settings, which ends no training."""
    loggers = pytest.importorskip(f"{package}.loggers", reason=f"needs {package}: pip install lightly")
    theirs = loggers.CSVLogger(tmp_path / "theirs", name="photos", version="one")
    options = SMALL | {"epochs": 2, "monitor": "label_free", "monitor_every": 1}
    run = crosslevel.train(photos, run=tmp_path / "r", logger="csv", loggers=[theirs], **options)
    with (Path(theirs.log_dir) / "metrics.csv").open() as file:
        heard = list(csv.DictReader(file))
    rows = metrics(run)
    assert [row["step"] for row in heard] == [row["step"] for row in rows]
    assert sum(bool(row["combined"]) for row in heard) == 2
    assert {*heard[0]} >= {"loss", "lr", "group_loss", "effective_rank"}
    for theirs_row, row in zip(heard, rows, strict=True):
        told = {name: float(value) for name, value in theirs_row.items() if value}
        written = {name: float(value) for name, value in row.items() if value and name != "epoch"}
        assert told == pytest.approx(written, rel=1e-5)
    if package == "pytorch_lightning":
        assert yaml.safe_load((Path(theirs.log_dir) / "hparams.yaml").read_text())["batch_size"] == 8


def test_an_error_is_told_as_one(photos, tmp_path):
    class Stops:
        def on_log(self, step, **_):
            raise KeyError("mine")

    sound = Recorder()
    with pytest.raises(KeyError, match="mine"):
        crosslevel.train(photos, run=tmp_path / "r", logger="csv", loggers=[sound], callbacks=[Stops()], **SMALL)
    assert sound.ends == ["failed"]


def test_names_and_what_is_not_installed():
    assert logger_names("csv") == ()
    with pytest.raises(UserError, match="logger='tensorbord' is unknown: did you mean tensorboard"):
        logger_names("tensorbord,csv")
    for name in ("tensorboard", "wandb", "mlflow"):
        if find_spec(name) is None:
            with pytest.raises(
                MissingExtra, match=rf"--logger {name} needs {name}: pip install 'crosslevel\[{name}\]'"
            ):
                logger_names(name)
        else:
            assert logger_names(f"{name}, csv,{name}") == (name,)


def test_mlflow_in_a_folder_has_the_rows_and_goes_on(photos, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="needs mlflow: pip install 'crosslevel[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    run = crosslevel.train(photos, run=tmp_path / "r", logger="mlflow", **SMALL)
    known = json.loads((run / "loggers.json").read_text())["mlflow"]
    client = MlflowClient((run / "mlruns").as_uri())
    rows = {int(row["step"]): float(row["loss"]) for row in metrics(run)}
    told = {entry.step: entry.value for entry in client.get_metric_history(known, "loss")}
    assert told == pytest.approx(rows, rel=1e-4)
    assert client.get_run(known).data.params["batch_size"] == "8"
    crosslevel.train(photos, resume=run, logger="mlflow", **SMALL)
    assert json.loads((run / "loggers.json").read_text())["mlflow"] == known


def test_wandb_offline(photos, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb: pip install 'crosslevel[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = crosslevel.train(photos, run=tmp_path / "r", logger="wandb", **SMALL)
    known = json.loads((run / "loggers.json").read_text())["wandb"]
    written = list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.stem for file in written] == [f"run-{known}"]
    content = written[0].read_bytes()
    assert b"instance_loss" in content
    assert b"batch_size" in content
