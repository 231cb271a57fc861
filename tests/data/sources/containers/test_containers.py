"""Which sources are taken for containers, and one use of each through the command line."""

import importlib
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from container_samples import flat, labelled, write_tar
from hypothesis import given
from hypothesis import strategies as st

from crosslevel.data.open import open_images
from crosslevel.data.sources.braces import expanded
from crosslevel.data.sources.folder import Files
from crosslevel.data.uri import parse
from crosslevel.features import embed
from crosslevel.settings.parser import run
from crosslevel.utils.errors import SourceError

train_file = importlib.import_module("crosslevel.training.train")

TINY = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--device=cpu", "--report_html=false"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("x.tar", ["x.tar"]),
        ("a-{008..010}.tar", ["a-008.tar", "a-009.tar", "a-010.tar"]),
        ("a-{8..10}.tar", ["a-8.tar", "a-9.tar", "a-10.tar"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{08..9}", ["08", "09"]),
        ("{train,val}-{0..1}.tar", ["train-0.tar", "train-1.tar", "val-0.tar", "val-1.tar"]),
        ("a{,b}.tar", ["a.tar", "ab.tar"]),
        ("{a}{}{0..x}{1..}.tar", ["{a}{}{0..x}{1..}.tar"]),
    ],
)
def test_braces_as_shells_expand_them(pattern, names):
    assert list(expanded(pattern)) == names


@given(first=st.integers(0, 300), last=st.integers(0, 300), width=st.integers(1, 6))
def test_a_padded_range_has_every_number_once(first, last, width):
    step = 1 if first <= last else -1
    names = list(expanded(f"s-{{{first:0{width}}..{last:0{width}}}}.tar"))
    assert [int(name[2:-4]) for name in names] == list(range(first, last + step, step))
    assert {len(name) for name in names if width >= 3} <= {6 + width}


def test_globs_folders_and_odd_names(tmp_path):
    folder = tmp_path / "d 🙂\n[1]"
    for part, numbers in {"a": range(4), "b": range(4, 9)}.items():
        (folder / part).mkdir(parents=True)
        write_tar(folder / part / f"x{{1..2}},column=🙂\n{part}.tar", labelled(numbers))
    file = folder / "a" / "x{1..2},column=🙂\na.tar"  # what exists as a path is taken as one
    assert len(open_images(file)) == 4
    assert len(open_images(folder / "b")) == 5
    both = open_images(f"{tmp_path}/*/{{a,b}}/*.tar")
    assert len(both) == 9
    assert both.paths[-1] == "b/x{1..2},column=🙂\nb.tar/0008.png"
    assert len(open_images(f"{tmp_path}/**/*.tar")) == 9
    (folder / "a" / "deep").mkdir()
    (folder / "a" / "deep" / "p.png").write_bytes(flat(1))
    (folder / "a" / "q.png").write_bytes(flat(2))
    assert isinstance(open_images(folder / "a"), Files)  # a folder of images is one, whatever else lies there


def test_refusals_are_one_line(tmp_path):
    write_tar(tmp_path / "a-0.tar", labelled(range(3)))
    write_tar(tmp_path / "a-2.tar", labelled(range(3)))
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    (tmp_path / "z.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "z.tgz").write_bytes(b"\x1f\x8b")
    (tmp_path / "dir.tar").mkdir()
    for source, says in {
        "a-{0..2}.tar": r"a-1.tar: no such file \(1 of 3 that .*a-{0..2}.tar names\)",
        "no*.tar": r"no\*.tar: no such file",
        "b.parquet": "b.parquet: no such file",
        "z.tar.gz": "a compressed tar file gives no access to single images: gunzip it first",
        "one": "z.tgz: a compressed tar file",
        "{a-0.tar,a.parquet}": "files of several kinds, parquet and tar: name one kind",
        "a-0.tar,column=x": "shards take no column=",
        "dir.tar": "no image found",
        "*.png": "no such folder, file or data set",
    }.items():
        with pytest.raises(SourceError, match=says) as caught:
            open_images(f"{tmp_path}/{source}")
        assert "\n" not in str(caught.value)


def test_sources_as_any_folder_can_open_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("rows")
    for source in ("x-{0..3}.tar", "a/*.parquet,column=b", "rows", "rows,label=c", "x.tar"):
        assert parse(source).absolute().text == f"{tmp_path}/{source}"
    for source in ("turntable:test,classes=3", "cifar10", "hf://a/b:c", "https://a/x-{0..3}.tar", "nowhere"):
        assert parse(source).absolute().text == source


def test_train_and_embed_through_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    members = [*labelled(range(20)), ("bad one.png", flat(0)[:-5]), ("bad one.cls", b"0")]
    write_tar(tmp_path / "x-0.tar", members)
    write_tar(tmp_path / "x-1.tar", labelled(range(20, 30)))
    options = ["--epochs=1", "--workers=0", "--run=runs/tar", "--memory=0.000001"]
    folder = run(train_file.train, ["x-{0..1}.tar", *TINY, *options])
    assert yaml.safe_load((folder / "config.yaml").read_text())["images"] == f"{tmp_path}/x-{{0..1}}.tar"
    assert "x-0.tar/bad one.png\ttruncated" in (folder / "bad_files.txt").read_text()
    table = pa.table({"image": [flat(i) for i in range(30)], "label": [i % 3 for i in range(30)]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=8)
    found = {}
    for source in ("x-*.tar", "x.parquet,column=image"):
        file = run(embed.embed, [str(folder), source, "-o", str(tmp_path / "f.parquet"), "--device=cpu"])
        found[source] = pq.read_table(file).to_pydict()
    tars, rows = found.values()
    assert tars["path"] == [f"x-{int(i >= 20)}.tar/{i:04d}.png" for i in range(30)]
    assert rows["path"] == [f"x.parquet/{i}" for i in range(30)]
    assert tars["label"] == rows["label"] == [i % 3 for i in range(30)]
    assert tars["feature"] == rows["feature"]
    with pytest.raises(SystemExit):
        run(embed.embed, [str(folder), "x.tar", "-o", str(tmp_path / "f.parquet"), "--device=cpu"])
    assert capsys.readouterr().err.strip().split("\n")[-1] == "crosslevel embed: x.tar: no such file"
