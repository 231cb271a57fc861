"""Files that are whole or not there."""

import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from crosslevel.utils.errors import UserError
from crosslevel.utils.files import is_unfinished, replacing, sweep, write, write_tensors


def test_the_old_content_stays_until_the_new_is_whole(tmp_path):
    file = tmp_path / "a.txt"
    write(file, "old")
    with replacing(file) as opened:
        opened.write(b"new")
        opened.flush()
        assert file.read_text() == "old"
        assert len(list(tmp_path.iterdir())) == 2
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def _half(opened):
    opened.write(b"ne")
    raise OSError("no space")


def test_a_block_that_fails_leaves_the_old_content_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    write(file, "old")
    with pytest.raises(OSError, match="no space"), replacing(file) as opened:
        _half(opened)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write(tmp_path / "a.txt", "text")
        write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {mode}


def test_a_link_in_its_place_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "a.txt").symlink_to(tmp_path / "precious")
    write(tmp_path / "a.txt", "new")
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "a.txt").is_symlink()


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    left, others = tmp_path / ".a.txt.0123abcd.part", tmp_path / ".b.txt.0123abcd.part"
    for file in (left, others, tmp_path / ".a.txt.part", tmp_path / "a.txt.0123abcd.part"):
        file.write_text("half")
    with replacing(tmp_path / "a.txt") as first, replacing(tmp_path / "a.txt") as second:
        assert not left.exists()
        first.write(b"first")
        second.write(b"second")
    assert (tmp_path / "a.txt").read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == [".a.txt.part", ".b.txt.0123abcd.part", "a.txt", "a.txt.0123abcd.part"]
    sweep(tmp_path)
    assert not others.exists()
    assert not is_unfinished("a.txt.0123abcd.part")


@pytest.mark.parametrize("name", [".tmpa1B2c3", ".report.html.4711.part"])
def test_what_former_versions_left_goes_from_a_folder_that_is_all_ours(tmp_path, name):
    for kept in ("a.tmp", ".tmpa1B2c3d", ".hidden.part", "x"):
        (tmp_path / kept).touch()
    (tmp_path / name).touch()
    sweep(tmp_path, "report.html")
    assert (tmp_path / name).exists()
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden.part", ".tmpa1B2c3d", "a.tmp", "x"]


def test_equal_tensors_are_equal_bytes_whatever_the_order_of_metadata(tmp_path):
    tensors = {
        "b": torch.arange(5, dtype=torch.uint8),
        "a": torch.randn(3, 2),
        "c": torch.ones(2, dtype=torch.bfloat16),
    }
    names = ["é", "one", "two", "three", "four"]
    for i in range(8):
        order = names[i % 5 :] + names[: i % 5]
        write_tensors(tmp_path / f"{i}.safetensors", tensors, {name: f'"{name}"' for name in order})
    contents = {file.read_bytes() for file in tmp_path.iterdir()}
    assert len(contents) == 1
    assert int.from_bytes(contents.pop()[:8], "little") % 8 == 0
    found = load_file(tmp_path / "0.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_what_is_no_plain_file_is_never_replaced(tmp_path):
    """A root that writes to a device must not take its place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="pipe is no plain file, and is not replaced: give another name"):
        write(pipe, "new")
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]
