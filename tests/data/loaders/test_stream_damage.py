"""Damaged images and shards of a stream: named, and survived."""

import gzip
import tarfile

import pytest
import torch
from stream_samples import archive, batches, seen, shards

from crosslevel.data.sources.containers.stream import ImageStream
from crosslevel.data.uri import parse
from crosslevel.utils.errors import SourceError


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_named_and_the_next_one_takes_its_place(tmp_path, workers):
    some = batches(shards(tmp_path, range(20), bad=(4, 11)), 5, 20, workers=workers)
    delivered = list(some)
    assert [len(batch.index) for batch in delivered] == [5] * 4
    assert set(some.bad_files.reasons) == {"s-0.tar/0004.png", "s-0.tar/0011.png"}
    assert set(some.bad_files.reasons.values()) == {"not an image, or the beginning of one is damaged"}
    found = torch.cat([batch.index for batch in delivered])
    replaced = found != torch.arange(20)
    assert int(replaced.sum()) == 2
    assert set(seen(delivered)) == set(range(20)) - {4, 11}


def test_more_bad_images_than_spare_ones(tmp_path):
    some = batches(shards(tmp_path, range(60), bad=set(range(60)) - {7, 33}), 30, 60)
    delivered = list(some)
    assert [len(batch.index) for batch in delivered] == [30, 30]
    assert set(seen(delivered)) <= {7, 33}
    assert len(some.bad_files) == 58
    lonely = batches(shards(tmp_path, range(200), bad=set(range(200)) - {7}), 2, 4)
    assert seen(lonely) == [7] * 4  # most batches have no readable image: they are passed over
    with pytest.raises(SourceError, match="hardly any of its images can be read"):
        list(batches(shards(tmp_path, range(20), bad=range(20)), 5, 20))


@pytest.mark.parametrize(("keep", "says"), [(0.5, "truncated"), (1200, "truncated"), (-1024, "the end of the archive")])
def test_a_truncated_shard_is_named_and_survived(tmp_path, keep, says):
    stream = shards(tmp_path, range(20), range(20, 30), others=False)
    file = tmp_path / "s-0.tar"
    with tarfile.open(file) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    whole = file.read_bytes()[: end + 1024]
    file.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    some = batches(stream, 5, 30)
    found = seen(some)
    assert list(some.bad_files.reasons) == ["s-0.tar"]
    assert says in some.bad_files.reasons["s-0.tar"]
    left = {0.5: 10, 1200: 1, -1024: 20}[keep]
    assert f"the {left:,} images before are used" in some.bad_files.reasons["s-0.tar"]
    assert set(found) == {*range(left), *range(20, 30)}
    assert len(found) == 30


def test_other_damages_are_named_and_survived(tmp_path):
    good = archive(range(10))
    (tmp_path / "a 🐈\n.tar").write_bytes(good)
    (tmp_path / "garbage.tar").write_bytes(b"garbage" * 1000)
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "none.tar").write_bytes(archive([1], name="{}.json"))
    (tmp_path / "header.tar").write_bytes(good[:3584] + b"\1" * 512 + good[4096:])
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(good, 0)[:4000])
    (tmp_path / "broken.tgz").write_bytes(gzip.compress(good)[:60] + b"\0" * 200)
    stream = ImageStream.open(parse(f"stream:{tmp_path}/*.t*"))
    (tmp_path / "empty.tar").unlink()
    some = batches(stream, 5, 40)
    assert len(list(some)) == 8
    begins = {
        "garbage.tar": "damaged: no member begins at byte 0",
        "empty.tar": "cannot be opened: No such file or directory",
        "none.tar": "no image in it (looked for apng, ",
        "header.tar": "damaged: no member begins at byte 3,584; the 2 images before",
        "cut.tar.gz": "damaged or truncated: Compressed file ended",
        "broken.tgz": "damaged or truncated: ",
    }
    assert set(some.bad_files.reasons) == set(begins)
    assert all(some.bad_files.reasons[title].startswith(reason) for title, reason in begins.items()), (
        some.bad_files.reasons
    )


def test_when_every_shard_fails_one_line_says_so(tmp_path):
    stream = shards(tmp_path, range(5), range(5, 10))
    for file in tmp_path.glob("*.tar"):
        file.unlink()
    for workers in (0, 1):
        some = batches(stream, 5, 10, workers=workers)
        with pytest.raises(SourceError, match=r"none of its 2 shards can be read \(the first: s-\d.tar: cannot be op"):
            list(some)
        assert set(some.bad_files.reasons) == {"s-0.tar", "s-1.tar"}
    with pytest.raises(SourceError, match=r"none of its 2 shards can be read"):
        stream.sample(3)


def test_a_rank_whose_shards_are_gone_reads_the_others(tmp_path):
    stream = shards(tmp_path, range(10), range(10, 20))
    (tmp_path / "s-0.tar").unlink()
    for rank in range(2):
        assert set(seen(batches(stream, 5, 40, rank=rank, world=2))) == set(range(10, 20))
