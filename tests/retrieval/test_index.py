"""The index: it finds what comparing with all finds, is kept, notices a table that changed, and takes what is new."""

import json
import os
import shutil
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from table_samples import crowds, write_table

from crosslevel.features.table import FeatureTable, open_table
from crosslevel.retrieval.search import exact, finder
from crosslevel.utils.console import printer
from crosslevel.utils.errors import MissingExtra

index = pytest.importorskip("crosslevel.retrieval.index")
pytest.importorskip("usearch", reason="needs usearch: pip install 'crosslevel[search]'")


@pytest.fixture
def features():
    return crowds([40] * 12, noise=0.3)[0]


class Counting(FeatureTable):
    """A table that counts how often its whole content is read for a checksum."""

    times_read = 0

    def content(self):
        self.times_read += 1
        return super().content()


def counted(file):
    """Open the index of a table whose file's times count at once; return it, and how often the content was read."""
    table = open_table(file)
    table = Counting(table.file, table.rows, table.width, table.names, table.metadata)
    return index.opened_index(table, printer(), settled=0.0), table.times_read


def write_plain(file, features):
    """A table whose footer knows no values: uncompressed, and without statistics."""
    flat = pa.array(features.numpy().ravel())
    columns = {"path": [f"{i:03}.png" for i in range(len(features))]}
    columns["feature"] = pa.FixedSizeListArray.from_arrays(flat, features.shape[1])
    options = {"compression": "none", "write_statistics": False, "use_dictionary": False}
    pq.write_table(pa.table(columns), file, **options)
    return file


def said(capsys):
    return capsys.readouterr().out


def opened(file):
    table = open_table(file)
    return index.opened_index(table, printer())


def recall(found, features, k=10):
    truth = exact(features, features, k).indices.tolist()
    return sum(len(set(a) & set(b)) for a, b in zip(found.indices.tolist(), truth, strict=True)) / (k * len(features))


def test_it_finds_the_nearest_and_their_cosines(tmp_path, features, capsys):
    file = write_table(tmp_path / "f.parquet", features)
    found = opened(file).search(torch.nn.functional.normalize(features, dim=1), 10)
    assert recall(found, features) > 0.99
    assert torch.allclose(found.values, exact(features, features, 10).values, atol=2e-3)  # float16
    about = json.loads((tmp_path / "f.parquet.index" / "about.json").read_text())
    assert about["recall"] >= index.RECALL
    assert "building an index of 480 rows" in said(capsys)


def test_features_that_all_point_one_way_are_told_apart_in_bytes(tmp_path):
    """As those behind a ReLU: the mean, which says nothing, is no part of a byte."""
    features = 2 + crowds([60] * 8, noise=0.3)[0]
    assert torch.nn.functional.cosine_similarity(features[:-1], features[1:]).min() > 0.9
    found = opened(write_table(tmp_path / "f.parquet", features))
    assert recall(found.search(torch.nn.functional.normalize(features, dim=1), 10), features) > 0.99
    assert found.metadata["width"] == index.WIDTHS[0]


def test_it_is_built_once_and_brought_up_to_date_where_the_table_changed(tmp_path, features, capsys):
    paths = [f"{i}.png" for i in range(len(features))]
    file = write_table(tmp_path / "f.parquet", features[:400], paths[:400])
    opened(file)
    said(capsys)
    opened(file)
    assert not said(capsys)
    # 100 came, in the middle, 20 went, and one image has another feature
    changed = features.clone()
    changed[200] = -changed[200]
    order = [*range(20, 100), *range(400, 480), *range(100, 400)]
    write_table(file, changed[order], [paths[i] for i in order])
    found = opened(file).search(torch.nn.functional.normalize(changed[order], dim=1), 10)
    assert "81 rows added, 21 removed" in said(capsys)
    assert recall(found, changed[order]) > 0.99
    assert torch.equal(found.indices[:, 0], torch.arange(len(order)))


@pytest.mark.parametrize("with_content", [True, False], ids=["now", "of an earlier version"])
def test_rows_that_were_exchanged_are_noticed(tmp_path, features, with_content, capsys):
    """Size and footer stay the same to the byte."""
    file, changed = write_plain(tmp_path / "f.parquet", features), features.clone()
    counted(file)
    about = tmp_path / "f.parquet.index" / "about.json"
    if not with_content:
        metadata = json.loads(about.read_text())
        about.write_text(json.dumps({k: v for k, v in metadata.items() if k not in ("content", "times")}))
    before = open_table(file).footer
    changed[[7, 411]] = features[[411, 7]]
    write_plain(file, changed)
    assert open_table(file).footer == before
    said(capsys)
    indices = counted(file)[0].search(torch.nn.functional.normalize(changed, dim=1), 10).indices
    assert "2 rows added, 2 removed" in said(capsys)
    assert torch.equal(indices[:, 0], torch.arange(len(changed)))


def test_a_table_that_was_touched_is_read_once_more_and_its_new_time_noted(tmp_path, features, capsys):
    file = write_plain(tmp_path / "f.parquet", features)
    counted(file)
    said(capsys)
    assert counted(file)[1] == 0
    os.utime(file)
    assert [counted(file)[1] for _ in range(3)] == [1, 0, 0]
    shutil.copy2(file, tmp_path / "copy")  # the same modification time, and written anew
    os.replace(tmp_path / "copy", file)
    assert [counted(file)[1] for _ in range(3)] == [1, 0, 0]
    assert not said(capsys)


def test_an_index_of_an_earlier_version_is_compared_once(tmp_path, features, capsys):
    file = write_plain(tmp_path / "f.parquet", features)
    counted(file)
    about = tmp_path / "f.parquet.index" / "about.json"
    metadata = json.loads(about.read_text())
    about.write_text(json.dumps({k: v for k, v in metadata.items() if k not in ("content", "times")}))
    said(capsys)
    assert recall(counted(file)[0].search(torch.nn.functional.normalize(features, dim=1), 10), features) > 0.99
    assert "all rows were compared with the table's, and are the same" in said(capsys)
    assert counted(file)[1] == 0
    assert not said(capsys)


def test_a_table_written_a_moment_ago_is_read_again(tmp_path, features):
    """Another change within the clock's step would leave the times as they are."""
    file = write_plain(tmp_path / "f.parquet", features)
    table = open_table(file)
    index.opened_index(table, printer(), settled=3600)
    assert json.loads((tmp_path / "f.parquet.index" / "about.json").read_text())["times"] is None
    assert counted(file)[1] == 1
    assert counted(file)[1] == 0


def test_a_damaged_or_half_written_index_is_built_anew(tmp_path, features, capsys):
    file = write_table(tmp_path / "f.parquet", features)
    opened(file)
    for name, left in (("about.json", b"{"), ("features.npy", b"half of it")):
        (tmp_path / "f.parquet.index" / name).write_bytes(left)
        said(capsys)
        found = opened(file).search(torch.nn.functional.normalize(features, dim=1), 10)
        assert "index" in said(capsys)
        assert recall(found, features) > 0.99


def test_tables_beyond_a_limit_use_it_by_themselves(tmp_path, features):
    rows, truth = len(features), exact(features[7:8], features, 6).indices
    for index, most, used in (("auto", rows - 1, True), ("auto", rows, False), ("off", rows - 1, False)):
        table = open_table(write_table(tmp_path / f"{index}-{most}.parquet", features))
        find = finder(table, index, None, printer(quiet=True), most)
        assert torch.equal(find(features[7:8], 6).indices, truth)
        assert (tmp_path / f"{index}-{most}.parquet.index").is_dir() == used


def test_without_the_library_the_message_installs_it(tmp_path, features, monkeypatch):
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(MissingExtra, match=r"pip install 'crosslevel\[search\]'"):
        opened(write_table(tmp_path / "f.parquet", features))
