"""A flipped byte, or a cut, in what Crosslevel wrote: one line that says what to do; no traceback, and no silence."""

import contextlib
import errno
import os

import numpy as np
import pytest
import torch
from packing_samples import full_at_the_end
from PIL import Image
from safetensors.torch import load_file, save_file
from strangers import refused

from crosslevel.data import index_cache, pack_writer
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import InMemoryImages
from crosslevel.data.loaders import pool
from crosslevel.data.loaders.batches import pack as in_memory
from crosslevel.data.open import open_images
from crosslevel.data.pack import pack
from crosslevel.evaluation.compare import compare
from crosslevel.evaluation.detection.training import Checkpoint
from crosslevel.features.embed import embed
from crosslevel.models.encoder import Encoder, View, load_encoder
from crosslevel.models.export import export
from crosslevel.runs import Run
from crosslevel.settings.parser import exit_on_error, run
from crosslevel.utils.errors import SourceError, UserError
from crosslevel.utils.files import write_tensors
from crosslevel.utils.tensors import load_safetensors, load_saved, write_saved


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


@pytest.fixture(scope="module", params=["of several sizes", "of one square size"])
def photos(tmp_path_factory, request):
    folder, draws = tmp_path_factory.mktemp("damage"), np.random.default_rng(0)
    for i in range(12):
        side = 12 if request.param == "of one square size" else 12 + i
        Image.fromarray(draws.integers(0, 256, (12, side, 3), np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def made(photos, tmp_path):
    return packed(photos, tmp_path / "p")


SMALL = pack_writer.Sizes(part=4, shard=2_000, at_once=2)


def packed(photos, folder):
    return run(pack, [str(photos), "-o", str(folder), "--size=12", "--workers=0"], sizes=SMALL)


READERS = {
    "one by one": lambda images: [images[i][0].clone() for i in range(len(images))],
    "in batches": lambda images: list(images.batch(torch.arange(len(images)))),
    "as a whole": lambda images: list(in_memory(images, 12, bad_files=BadFiles()).data),
}


def read(folder):
    """All pixels, in every way that there is: each of them finds what the others find."""
    found, error = [], None
    for how in READERS if isinstance(open_images(folder), InMemoryImages) else ["one by one"]:
        try:
            found.append(READERS[how](open_images(folder)))
        except SourceError as said:
            error = said
    if error is not None:
        assert not found
        raise error
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    return found[0]


@pytest.mark.parametrize("name", ["00000.bin", "index.safetensors", "pack.json"])
def test_no_flipped_byte_of_a_pack_goes_unnoticed(made, name):
    whole, content = read(made), (made / name).read_bytes()
    for at in range(3, len(content), max(1, len(content) // 60)):
        flip(made / name, at)
        try:
            found = read(made)
        except SourceError as error:
            said = str(error)
            assert str(made) in said
            assert said.endswith((": delete it and pack again", "pack again"))
        else:  # a space or a line's end between the words of a file of text
            assert name != "00000.bin"
            assert len(found) == len(whole)
            assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True)), at
            assert open_images(made).paths[:] == [f"{i:02}.png" for i in range(12)]
        (made / name).write_bytes(content)


@pytest.mark.parametrize("name", ["00000.bin", "index.safetensors", "pack.json"])
def test_a_cut_pack_is_named_and_packed_anew(photos, made, name, capsys):
    whole = {file.name: file.read_bytes() for file in made.iterdir()}
    os.truncate(made / name, len(whole[name]) // 2)
    with pytest.raises(SourceError, match=r"this pack is damaged .*: delete it and pack again"):
        open_images(made)
    packed(photos, made)
    assert "cannot be continued" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in made.iterdir()} == whole


def test_a_damaged_part_of_an_unfinished_pack_is_packed_again(photos, made, tmp_path):
    whole = {file.name: file.read_bytes() for file in made.iterdir()}
    for name, damage in [("part-000001.safetensors", flip), ("unfinished.json", flip), (None, None)]:
        with full_at_the_end(), pytest.raises(SystemExit):
            packed(photos, tmp_path / "cut")
        if name is not None:
            damage(tmp_path / "cut" / name, -10)
    packed(photos, tmp_path / "cut")
    assert {file.name: file.read_bytes() for file in (tmp_path / "cut").iterdir()} == whole


def test_a_pack_of_the_former_version_still_opens(made):
    """It has no checksums: neither of images, nor of the index, nor of pack.json."""
    whole, index = read(made), load_file(made / "index.safetensors")
    del index["checks"]
    save_file(index, made / "index.safetensors")
    text = (made / "pack.json").read_text()
    (made / "pack.json").write_text("".join(line for line in text.splitlines() if '"check"' not in line)[:-2] + "}")
    (made / "pack.json").write_text((made / "pack.json").read_text().replace(",}", "}"))
    assert all(torch.equal(a, b) for a, b in zip(read(made), whole, strict=True))


def test_no_flipped_byte_of_tensors_goes_unnoticed(tmp_path):
    file, tensors = tmp_path / "a.safetensors", {"x": torch.arange(8.0), "y": torch.ones(3, dtype=torch.int64)}
    write_tensors(file, tensors, {"k": "v é"})
    content = file.read_bytes()
    assert load_safetensors(file)[1] == {"k": "v é"}
    unnoticed = 0
    for at in range(0, len(content), 3):
        flip(file, at)
        found, about = tensors, {"k": "v é"}
        with contextlib.suppress(UserError):
            found, about = load_safetensors(file)
            unnoticed += 1
        assert about["k"] == "v é"
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        file.write_bytes(content)
    assert unnoticed <= len("crosslevel.crc32") // 3 + 4  # a byte of the checksum's name, or a space behind the header


def test_a_damaged_index_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSLEVEL_CACHE", str(tmp_path))
    table = {"x": torch.arange(9)}
    index_cache.remembered("k", "key", "state", lambda: table)
    (file,) = tmp_path.iterdir()
    flip(file, -3)
    assert index_cache.remembered("k", "key", "state", lambda: {"x": torch.zeros(1)})["x"].tolist() == [0.0]
    assert index_cache.remembered("k", "key", "state", lambda: table)["x"].tolist() == [0.0]


def test_a_damaged_state_of_a_fine_tuning_says_what_to_do(tmp_path):
    file = tmp_path / "last.ckpt"
    write_saved(file, {"x": torch.arange(64)})
    assert torch.equal(load_saved(file)["x"], torch.arange(64))
    flip(file, file.read_bytes().index(bytes(torch.arange(64).numpy().data)) + 9)
    with pytest.raises(UserError, match=r"last.ckpt is damaged in .*: delete it, and .* begins anew"):
        load_saved(file)
    layer = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="delete it"):
        Checkpoint(file, "key", 0.0).restore(layer, torch.optim.SGD(layer.parameters()))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    file = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    made = Encoder("resnet18", True, 0.0625)
    made.view = View(16)
    return made.save(file)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "text", "no words", "other words", "list"])
@pytest.mark.parametrize("verb", [export, embed])
def test_a_broken_encoder_is_one_line(encoder, tmp_path, capsys, damage, verb):
    content, file = encoder.read_bytes(), tmp_path / "encoder.safetensors"
    file.write_bytes({"cut": content[:-100], "empty": b"", "text": b"no encoder"}.get(damage, content))
    if damage == "flipped":
        flip(file, -1000)
    words = {"no words": "{", "other words": '{"name": "resnet18", "view": {"size": "x"}}', "list": "[1]"}
    if damage in words:
        write_tensors(file, load_file(encoder), {"crosslevel": words[damage]})
    rest = ["photos", "--device=cpu"] if verb is embed else ["--format=timm"]
    said = refused(verb, [str(file), *rest, "-o", str(tmp_path / f"o.{'npy' if verb is embed else 'pth'}")], capsys)
    assert str(file) in said
    assert sorted(os.listdir(tmp_path)) == ["encoder.safetensors"]


def test_an_encoder_of_a_former_version_has_no_checksum_and_is_read(encoder, tmp_path):
    from safetensors import safe_open

    with safe_open(encoder, framework="pt") as opened:
        about = {key: value for key, value in opened.metadata().items() if key != "crosslevel.crc32"}
    save_file(load_file(encoder), tmp_path / "encoder.safetensors", about)
    assert load_encoder(tmp_path).identity() == load_encoder(encoder).identity()


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b'{"results": [{"protocol": "knn"}]}'])
def test_damaged_results_are_one_line(tmp_path, capsys, content):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_bytes(content)
    said = refused(compare, [str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "c")], capsys)
    assert "a/evaluation.json is damaged" in said
    assert "delete it, and evaluate again" in said


@pytest.mark.parametrize("name", ["config.yaml", "images.json"])
def test_a_run_whose_notes_are_damaged_is_one_line(tmp_path, made, name):
    (tmp_path / name).write_bytes(b"\xff\xfe{")
    folder = Run(tmp_path)
    with pytest.raises(UserError, match=f"{name} (cannot be read|is damaged)"):
        folder.settings() if name == "config.yaml" else folder.changed_images(open_images(made))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "f"), "free some space there, or write elsewhere"),
        (OSError(errno.EROFS, "Read-only file system", "f"), "nothing can be written there: give a folder of your own"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), "or give a folder of your own"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "killed by signal: Killed; if memory",
        ),
        (RuntimeError("unable to write to file </torch_1>: No space left on device (28)"), "enlarge it (docker run"),
    ],
)
def test_what_the_machine_refuses_is_one_line_with_what_to_do(error, said, capsys):
    with pytest.raises(SystemExit, match="2"), exit_on_error("crosslevel pack"):
        raise error
    told = capsys.readouterr().err
    assert told.startswith("crosslevel pack: ")
    assert said in told
    assert told.count("\n") == 1


def test_a_worker_that_finds_damage_tells_it_in_one_line(made, capsys):
    flip(made / "00000.bin", 5)
    source = open_images(made)
    loader = pool.Pool(_Read(source), [0], 1, persistent=False)
    with pytest.raises(SystemExit, match="2"), exit_on_error("crosslevel embed"):
        list(loader)
    said = capsys.readouterr().err
    assert said.startswith(f"crosslevel embed: {made}: this pack is damaged (the pixels of 00.png")
    assert said.count("\n") == 1


class _Read(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __getitem__(self, i):
        return self.images[i][0]
