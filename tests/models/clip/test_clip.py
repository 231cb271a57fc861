"""Words as queries: a tiny CLIP's text tower and table of words, compared with a float64 loop and with open_clip."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from clip_samples import EMBED, HEADS, LENGTH, by_hand, table, text_state, write_clip
from hub_samples import local_hub
from run_samples import write_images
from safetensors.torch import load_file, save_file
from table_samples import write_encoder

import crosslevel
from crosslevel.cli import main
from crosslevel.models.clip.open import open_clip_of
from crosslevel.models.clip.tokens import Tokens
from crosslevel.models.clip.tower import TextTower
from crosslevel.utils.errors import UserError

QUIET = {"device": "cpu", "workers": 0, "quiet": True}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Images, a CLIP's files in a folder, and a table of its features of them."""
    folder = tmp_path_factory.mktemp("clip")
    write_images(folder / "photos", count=8, size=(32, 32))
    write_clip(folder / "clip")
    crosslevel.embed(folder / "clip", folder / "photos", output=folder / "t.parquet", **QUIET)
    return folder


def test_the_tower_is_that_of_the_paper():
    words = table()
    state = text_state(len(words["model"]["vocab"]))
    tokens = Tokens(words["model"]["vocab"], [tuple(m.split()) for m in words["model"]["merges"]])
    for fast in (True, False):
        tower = TextTower(state, HEADS, fast)
        for text in ("a cat", "dog", "", "a very long text about nothing"):
            numbers = tokens(text, LENGTH)
            wanted = by_hand(state, numbers.tolist(), fast)
            np.testing.assert_allclose(tower(numbers[None])[0].numpy(), wanted, atol=2e-6)


def test_words_are_cut_as_the_table_says():
    words = table()
    vocabulary = words["model"]["vocab"]
    tokens = Tokens(vocabulary, [tuple(m.split()) for m in words["model"]["merges"]])
    name = {number: piece for piece, number in vocabulary.items()}

    def pieces(text, length=20):
        return [name[n] for n in tokens(text, length).tolist()][1 : int(tokens(text, length).argmax())]

    assert pieces("Cat") == pieces("  cat ") == ["cat</w>"]
    assert pieces("cats") == ["ca", "t", "s</w>"]
    assert pieces("dog's 42!?") == ["dog</w>", "'", "s</w>", "4</w>", "2</w>", "!", "?</w>"]
    assert pieces("é") == pieces("e\u0301") == ["Ã", "©</w>"]
    numbers = tokens("dog " * 30, 6).tolist()
    assert [name[n] for n in numbers] == ["<|startoftext|>", *["dog</w>"] * 4, "<|endoftext|>"]


def test_tower_and_words_are_open_clips():
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip, to compare with: pip install open_clip_torch")
    theirs = open_clip.SimpleTokenizer(context_length=77)
    vocabulary = {word.replace("_of_", "of").replace("<", "<|").replace(">", "|>") if "_of_text" in word else word: n
                  for word, n in theirs.encoder.items()}  # fmt: skip
    tokens = Tokens(vocabulary, [pair for pair, _ in sorted(theirs.bpe_ranks.items(), key=lambda item: item[1])])
    for text in (
        "a photo of a cat",
        "Naïve café's №5, 3½ & 日本語!!'s",
        "don't\tI'll  we've 100%",
        "x" * 300,
        "a . b,c",
    ):
        assert torch.equal(tokens(text, 77), theirs(text)[0].long()), text
    vision = open_clip.model.CLIPVisionCfg(layers=1, width=32, head_width=32, patch_size=16, image_size=32)
    text = open_clip.model.CLIPTextCfg(context_length=77, vocab_size=49408, width=32, heads=2, layers=2)
    for fast in (True, False):
        torch.manual_seed(0)
        model = open_clip.CLIP(16, vision, text, quick_gelu=fast).eval()
        tower = TextTower(model.state_dict(), 2, fast)
        numbers = theirs(["a photo of a cat", "two dogs"])
        with torch.no_grad():
            wanted = model.encode_text(numbers, normalize=True)
        torch.testing.assert_close(tower(numbers), wanted, atol=1e-5, rtol=1e-5)


def test_words_find_the_images_that_the_projection_puts_next_to_them(home, capsys):
    state = load_file(home / "clip" / "open_clip_model.safetensors")
    features = (
        np.array(pq.read_table(home / "t.parquet")["feature"].to_pylist()) @ state["visual.proj"].double().numpy()
    )
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    words = Tokens.read(home / "clip" / "tokenizer.json")("a cat", LENGTH).tolist()
    distances = 1 - features @ by_hand(state, words)
    main(["search", str(home / "t.parquet"), "a cat", "-k", "5", "-o", str(home / "out"), "--device=cpu"])
    assert "like a cat" in capsys.readouterr().out
    (found,) = json.loads((home / "out" / "search.json").read_text())["results"]
    assert [match["row"] for match in found["matches"]] == np.argsort(distances)[:5].tolist()
    np.testing.assert_allclose([m["distance"] for m in found["matches"]], np.sort(distances)[:5], atol=2e-5)
    assert "a cat" in (home / "out" / "search.html").read_text()


def test_a_clip_of_the_hub_is_searched_without_a_table(home, tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSLEVEL_CACHE", str(tmp_path / "cache"))
    with local_hub(monkeypatch, tmp_path / "hub") as (hub, _):
        for file in (home / "clip").iterdir():
            hub.files.setdefault("somebody/clip", {})[file.name] = file.read_bytes()
        options = {"images": str(home / "photos"), "k": 3, "device": "cpu", "quiet": True}
        (found,) = crosslevel.search("hf-hub:somebody/clip", "a dog", **options)
        (same,) = crosslevel.search(str(home / "t.parquet"), "a dog", k=3, device="cpu", quiet=True)
    assert [match["path"] for match in found["matches"]] == [match["path"] for match in same["matches"]]


def test_what_is_no_clip_is_one_line(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    write_encoder(home / "run")
    crosslevel.embed("run", "photos", output="r.parquet", **QUIET)
    other = write_clip(home / "other", seed=3)
    (home / "plain").mkdir()
    (home / "plain" / "config.json").write_text((home / "clip" / "config.json").read_text())
    save_file({k: v for k, v in other.items() if k.startswith("visual.")}, home / "plain" / "model.safetensors")
    for line, what in [
        (["r.parquet", "a cat"], "words are a query where a CLIP by name made the table, and"),
        (["t.parquet", "cats/dog.jpg"], "there is no such file, and no row of t.parquet has this path"),
        (["t.parquet", "dog.jpg"], "there is no such file, and no row of t.parquet has this path"),
        (["t.parquet", "a cat", "--run=other"], "t.parquet is of another encoder than other"),
        (["t.parquet", "a cat", "--run=plain"], "plain is no CLIP, which reads words: it has no open_clip_config.json"),
        (["t.parquet", "a cat", "--index=on"], "--index on: an index knows images alone"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(["search", *line, "--device=cpu"])
        said = capsys.readouterr().err
        assert (ended.value.code, said.count("\n")) == (2, 1), said
        assert what in said


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"tokenizer.json": None}, "it has no tokenizer.json, which queries in words need"),
        ({"tokenizer.json": "[]"}, "tokenizer.json is no table of words"),
        ({"tokenizer.json": '{"model": {"vocab": {"a": 1}, "merges": []}}'}, "it is not CLIP's"),
        ({"tokenizer.json": '{"model": {"vocab": {}, "merges": [["a"]]}}'}, "is no table of words"),
        ({"open_clip_config.json": "[1]"}, "is no config of a CLIP"),
        (
            {"open_clip_config.json": '{"model_cfg": {"text_cfg": {"pool_type": "last"}}}'},
            "another kind than CLIP's own",
        ),
        ({"open_clip_config.json": '{"model_cfg": {"text_cfg": {"heads": 7}}}'}, "has 7 heads"),
        ({"ln_final.bias": None}, "its text tower is not CLIP's"),
        ({"token_embedding.weight": None}, "no text tower of CLIP's kind"),
        ({"visual.proj": None}, "do not take images' features of 64 numbers to words of 24"),
        ({"text_projection": torch.zeros(31, EMBED)}, "its text tower is not CLIP's"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, changes, what):
    state = write_clip(tmp_path)
    for name, value in changes.items():
        if name.endswith(".json"):
            (tmp_path / name).unlink() if value is None else (tmp_path / name).write_text(value)
        else:
            state[name] = value
    save_file({k: v for k, v in state.items() if v is not None}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=what):
        open_clip_of(str(tmp_path), 64)
