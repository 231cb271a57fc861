"""Files of a stranger that hold more than their bytes, lead elsewhere, or never end: each is refused in one line."""

import dataclasses
import io
import os
import sqlite3
import tarfile
import zipfile

import pytest
import torch
from strangers import TINY, refused

from crosslevel.data.bad_files import BadFiles, unescaped
from crosslevel.data.duplicates.sets import rows_of, write_rows
from crosslevel.data.open import open_images
from crosslevel.data.pack import pack
from crosslevel.data.pack_writer import Sizes
from crosslevel.features.embed import embed
from crosslevel.models.encoder import Encoder, View
from crosslevel.runs import Run
from crosslevel.settings.parser import run
from crosslevel.training.train import train
from crosslevel.utils.errors import SourceError, UserError
from crosslevel.utils.tensors import damage_of, load_safetensors, load_tensors


@pytest.fixture
def tiny(scene):
    encoder = Encoder("resnet18", True, 0.0625)
    encoder.view = View(16)
    encoder.save(scene.folder / "runs")
    return scene.folder / "runs"


def archive(file, change):
    """A checkpoint whose archive was changed."""
    whole = io.BytesIO()
    torch.save({"state_dict": {"conv1.weight": torch.zeros(64, 3, 7, 7)}}, whole)
    with zipfile.ZipFile(whole) as before, zipfile.ZipFile(file, "w") as after:
        for part in before.infolist():
            after.writestr(*change(part, before.read(part)))


def test_a_checkpoint_with_a_bomb_in_it_is_refused_unread(scene, capsys):
    """Parts that are compressed, or lie on each other, hold more than the file has bytes; PyTorch writes none."""
    file = scene.folder / "r"
    archive(file, lambda part, data: (part.filename, bytes(10**8) if "data/0" in part.filename else data, 8))
    assert file.stat().st_size < 10**6
    assert damage_of(file) == "damaged: it has compressed parts"
    with pytest.raises(UserError, match="it has compressed parts"):
        load_tensors(file)
    assert "compressed parts" in refused(train, ["photos", "--encoder.weights=r", *TINY], capsys)
    with zipfile.ZipFile(file, "w") as bomb:
        bomb.writestr("a/data.pkl", bytes(10**5))
        kernel = bomb.infolist()[0]
        for i in range(50):
            again = zipfile.ZipInfo(f"a/data/{i}")
            for name in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(again, name, getattr(kernel, name))
            bomb.filelist.append(again)
            bomb.NameToInfo[again.filename] = again
        bomb._didModify = True
    assert "lie on each other" in damage_of(file)


LARGER = {  # opcodes of the pickle: numbers of elements, a stride, an offset
    "storage": (b"M\xe8\x03", b"J\0\0\0\x7f"),
    "stride": (b"K\x01\x85", b"J\0\0\0\x7f\x85"),
    "offset": (b"K\0M", b"J\0\0\0\x7fM"),
}


@pytest.mark.parametrize("what", LARGER)
def test_a_tensor_that_is_larger_than_its_file_is_refused(scene, what):
    file, whole = scene.folder / "r", io.BytesIO()
    torch.save({"x": torch.zeros(1000)}, whole)
    with zipfile.ZipFile(whole) as before, zipfile.ZipFile(file, "w") as after:
        for part in before.infolist():
            data = before.read(part)
            if part.filename.endswith("data.pkl"):
                assert LARGER[what][0] in data
                data = data.replace(*LARGER[what])
            after.writestr(part.filename, data)
    for mapped in (False, True):
        with pytest.raises(UserError, match="damaged, or none of PyTorch's"):
            load_tensors(file, mmap=mapped)


@pytest.mark.parametrize("name", ["config.yaml", "encoder.safetensors", "checkpoints/last.ckpt", "cld.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_nothing_in_a_run_is_read_that_never_ends(scene, tiny, capsys, name, kind):
    folder = scene.folder / "r"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("images: photos\n")
    (folder / "cld.safetensors").write_bytes(tiny.read_bytes())
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to("/dev/zero")
    if name == "encoder.safetensors":
        assert "has no encoder.safetensors" in refused(embed, ["r", "photos", "-o", "t.parquet"], capsys)
        assert "encoder.weights=" in refused(train, ["photos", f"--encoder.weights={folder / name}", *TINY], capsys)
    elif name == "checkpoints/last.ckpt":
        assert "last.ckpt does not exist" in refused(train, ["photos", "--resume=r", *TINY], capsys)
        with pytest.raises(UserError, match="pipe or a device"):
            load_tensors(folder / name)
    else:
        with pytest.raises(UserError, match="pipe or a device"):
            Run(folder).settings() if name == "config.yaml" else load_safetensors(folder / name)
        assert "pipe or a device" in refused(train, ["photos", f"--config=r/{name}", *TINY], capsys)


def test_links_in_a_folder_of_a_stranger_lead_nowhere(scene, tiny, capsys, monkeypatch):
    """A lock, the shards of an unfinished pack, the pieces of a table: what they point at stays as it is."""
    monkeypatch.setenv("CROSSLEVEL_CACHE", str(scene.folder / "runs.cache"))
    scene.before.add("runs.cache")
    folder = scene.folder / "r"
    folder.mkdir()
    (folder / ".crosslevel.lock").symlink_to(scene.victim)
    said = refused(train, ["photos", *TINY, "--run=r"], capsys)
    assert "symbolic link" in said
    for name in ("metrics.csv", "config.yaml", "warnings.txt", "images.json", "report.html"):
        (folder / name).symlink_to(scene.victim)
    (folder / ".crosslevel.lock").unlink()
    run(train, ["photos", *TINY, "--run=r"])
    assert scene.victim.read_text() == "here"
    (scene.folder / "t").mkdir()
    for name in ("00000.bin", "part-000000.safetensors", "unfinished.json", "index.safetensors"):
        (scene.folder / "t" / name).symlink_to(scene.victim)
    (scene.folder / "t" / "pack.json").write_text('{"version": 0}')
    run(pack, ["photos", "-o", "t", "--workers=0"], sizes=Sizes(part=4))
    assert len(open_images("t")) == 16
    assert scene.victim.read_text() == "here"
    (scene.folder / "data").mkdir()
    scene.before.add("data")
    (scene.folder / "data" / "00000.parquet").write_text("mine")
    (folder / "f.parquet.parts").symlink_to(scene.folder / "data")
    said = refused(embed, [str(tiny), "photos", "-o", "r/f.parquet", "--device=cpu", "--workers=0"], capsys)
    assert "f.parquet.parts is a link" in said
    assert os.listdir(scene.folder / "data") == ["00000.parquet"]


def test_a_folder_that_holds_itself_ends(scene):
    (scene.folder / "photos" / "again").symlink_to(scene.folder / "photos")
    (scene.folder / "photos" / "up").symlink_to(scene.folder)
    assert len(open_images(str(scene.folder / "photos"))) == 16


def test_a_study_of_a_stranger_trains_only_what_is_searched(tmp_path):
    """A trial that waits in it, with a method, or with a value that the search does not have."""
    optuna = pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")
    from crosslevel.tuning.plan import Plan, url
    from crosslevel.tuning.search_space import Numbers
    from crosslevel.tuning.study import Search
    from crosslevel.tuning.trials import outcome

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space, given = {"lr": Numbers(0.1, 1.0), "optimizer": ("sgd", "adamw")}, {"lr": 0.2, "optimizer": "sgd"}
    plan = Plan(
        folder=tmp_path / "s", storage=url(None, tmp_path / "s"), space=space, start=[given], epochs=1, budget=9.0,
        trials=5, sampler="random", pruning=False, seed=0, agreed={},
    )  # fmt: skip
    search, trained = Search(plan), []
    study = optuna.load_study(study_name="s", storage=plan.storage)

    def add(name, value):
        choices = {name: optuna.distributions.CategoricalDistribution([value])}
        state = optuna.trial.TrialState.WAITING
        study.add_trial(optuna.trial.create_trial(state=state, params={name: value}, distributions=choices))

    def training(number, parameters):
        trained.append(parameters)
        yield {"combined": 1.0, "effective_rank": 5.0}

    add("method", "stranger.Method")
    add("run", "/victim")
    try:
        with pytest.raises(UserError, match="its study has 'method', which is not searched"):
            search.work(training)
        search.work(training)
        kinds = [outcome(trial) for trial in search.study.get_trials()]
    finally:
        search.close()
    assert kinds[:2] == ["refused"] * 2
    assert all(set(parameters) == set(space) for parameters in trained)
    with pytest.raises(UserError, match="trial 0 of its study has 'method', which is not searched"):
        Search(plan)
    other = dataclasses.replace(plan, folder=tmp_path / "o", storage=url(None, tmp_path / "o"))
    Search(other).close()
    study = optuna.load_study(study_name="o", storage=other.storage)
    add("optimizer", "<script>=x\x1b[2J")
    with pytest.raises(UserError, match="'optimizer', which is not searched, or not in this range"):
        Search(other)


def test_no_trigger_of_a_study_calls_a_function(tmp_path):
    from crosslevel.tuning.storage import StudyFile

    with sqlite3.connect(tmp_path / "study.db", factory=StudyFile) as study:
        assert study.execute("PRAGMA trusted_schema").fetchone() == (0,)


def test_no_cell_of_a_table_is_a_formula(tmp_path):
    names = ["=HYPERLINK('http://x','y').png", "+1.png", "-2.png", "@sum.png", "\t=1.png", "a=b.png", "\\x.png"]
    rows = [{"path": name, "kind": "near"} for name in names]
    write_rows(tmp_path / "d.csv", ("path", "kind"), rows)
    lines = (tmp_path / "d.csv").read_text().splitlines()[1:]
    assert not [line for line in lines if line.lstrip('"')[:1] in ("=", "+", "-", "@", "\t")]
    assert [path for _, path in rows_of(str(tmp_path / "d.csv"), "kind")] == names


def test_bad_files_of_a_stranger_are_text(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"a\\nb\tx\\ty\n\xff\t\x1b[2J\n" + b"x" * 10**6 + b"\nno tab\n\t\n")
    bad_files = BadFiles()
    bad_files.read(tmp_path / "b.txt")
    assert bad_files.reasons == {"a\nb": "x\ty", "\udcff": "\x1b[2J", "": ""}
    assert unescaped("\\") == "\\"


@pytest.mark.parametrize(
    "name", ["x-{0..999999999999}.tar", "x-{0..99999}-{0..99999}.tar", "{0..9}" * 18 + ".tar", "{a,b}" * 5000 + ".tar"]
)
def test_no_braces_stand_for_more_names_than_there_is_memory(name):
    for source in (name, f"stream:{name}", f"https://h/{name}"):
        with pytest.raises(SourceError, match=r"braces|no such file") as told:
            open_images(source, streams=True)
        assert len(str(told.value)) < 31_000


def test_members_of_a_tar_that_are_no_files_are_left_alone_and_no_name_leads_anywhere(scene):
    """Devices, pipes, links of both kinds, absolute names, names that go up, and names of several lines."""
    picture = (scene.folder / "photos" / "1.png").read_bytes()
    names = ["../../up.png", f"{scene.folder}/absolute.png", "two\nlines.png", "a\x1b[2J\u202egnp.png", "./dot.png"]
    with tarfile.open(scene.folder / "r", "w") as shard:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(picture)
            shard.addfile(member, io.BytesIO(picture))
        for number, kind in enumerate(b"12346"):  # hard and symbolic links, devices, pipes
            member = tarfile.TarInfo(f"{number}.png")
            member.type, member.linkname, member.devmajor, member.devminor = bytes([kind]), str(scene.victim), 1, 5
            shard.addfile(member)
    (scene.folder / "r").rename(scene.folder / "runs")
    os.mkdir(scene.folder / "r")
    (scene.folder / "runs").rename(scene.folder / "r" / "x.tar")
    source = open_images(str(scene.folder / "r" / "x.tar"))
    assert len(source) == len(names)
    assert all(source[i][0].shape == (3, 16, 16) for i in range(len(names)))
    assert not (scene.folder.parent.parent / "up.png").exists()
    assert not (scene.folder / "absolute.png").exists()
