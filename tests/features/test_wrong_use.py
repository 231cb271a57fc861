"""What goes wrong most where features are used ends every verb in one line that says what to do."""

import os
import signal
import socket
import threading
import urllib.request
import webbrowser

import pytest
import torch
from hub_samples import local_hub
from PIL import Image
from run_samples import write_images
from table_samples import crowds, write_encoder, write_table

import crosslevel
from crosslevel.cli import main

KNOWN = "timm:test_vit.r160_in1k"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run, its table and images; another run; a table without rows; files that are no images."""
    folder = tmp_path_factory.mktemp("wrong")
    write_images(folder / "photos", count=4)
    write_encoder(folder / "run")
    write_encoder(folder / "other", seed=3)
    crosslevel.embed(
        folder / "run", folder / "photos", output=folder / "t.parquet", device="cpu", workers=0, quiet=True
    )
    write_table(folder / "empty.parquet", torch.zeros(0, 8))
    (folder / "text.jpg").write_text("no image")
    (folder / "nothing").mkdir()
    Image.new("RGB", (16, 16)).save(folder / "one.png")
    return folder


def refused(capsys, *line):
    """What a command that ends with 2 says: one line."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in line])
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1), said
    return said


def lines_of(name):
    """Each verb with an encoder of this name."""
    return {
        "train": ["photos", f"--encoder.name={name.removeprefix('timm:')}", "--encoder.pretrained=true"],
        "embed": [name, "photos"],
        "evaluate": [name, "photos", "--test=photos"],
        "inspect": ["photos", "--run", name],
        "search": [name, "one.png", "--images=photos"],
        "explore": [name, "--images=photos", "--export=page"],
        "curate": [name, "--images=photos"],
        "classify": [name, "photos", "photos"],
        "export": [name],
    }


VERBS = tuple(lines_of("timm:x"))


@pytest.mark.parametrize("verb", VERBS)
def test_a_name_that_nobody_knows(home, tmp_path, monkeypatch, capsys, verb):
    monkeypatch.chdir(home)
    with local_hub(monkeypatch, tmp_path / "cache"):
        assert "the hub knows no timm/test_vit.r160_in1k: check the name" in refused(
            capsys, verb, *lines_of(KNOWN)[verb]
        )
    said = refused(capsys, verb, *lines_of("timm:test_vitt")[verb])
    assert "'test_vitt' is not a timm model: did you mean test_vit" in said


@pytest.mark.parametrize("verb", VERBS)
def test_no_network(home, tmp_path, monkeypatch, capsys, verb):
    monkeypatch.chdir(home)
    with socket.socket() as closed:  # nobody listens at its address
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        said = refused(capsys, verb, *lines_of(KNOWN)[verb])
    assert "cannot be reached, and timm/test_vit.r160_in1k is not in the cache: connect once" in said


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (["search", "t.parquet", "one.png", "--run=other"], "t.parquet is of another encoder than other"),
        (["search", "t.parquet", "text.jpg"], "text.jpg is no image that can be read"),
        (["search", "t.parquet", "nothing"], "nothing holds no image to look for"),
        (["search", "t.parquet", "none.jpg"], "none.jpg: there is no such file, and no row of t.parquet has this path"),
        (["search", "run", "one.png"], "run does not say which images it was trained on: give --images"),
        (["search", "empty.parquet", "one.png"], "empty.parquet has 0 rows: needs 1 at least"),
        (["search", "empty.parquet", "one.png", "--index=on"], "empty.parquet has 0 rows: needs 1 at least"),
        (["explore", "empty.parquet"], "empty.parquet has 0 rows: needs 2 at least"),
        (["curate", "empty.parquet"], "empty.parquet has 0 rows: needs 2 at least"),
        (["explore", "text.jpg"], "text.jpg is no Parquet table, or damaged"),
        (
            ["curate", "none.parquet"],
            "none.parquet: there is no such table: crosslevel embed RUN IMAGES -o none.parquet",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_tables_and_queries_that_are_none(home, monkeypatch, capsys, line, what):
    monkeypatch.chdir(home)
    assert what in refused(capsys, *line)


def test_a_port_in_use(home, monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(capsys, "explore", home / "t.parquet", f"--port={port}", "--browser=false")
    assert f"port {port}" in said.replace("=", " ")
    assert "is in use" in said


@pytest.mark.parametrize("fails", [False, True])
def test_without_a_browser_the_address_is_there_to_be_opened(home, monkeypatch, capsys, fails):
    """Somebody opens it, and then presses Ctrl-C."""
    pages = []

    def visit(address):
        with urllib.request.urlopen(address) as page:
            pages.append(page.read())
        os.kill(os.getpid(), signal.SIGINT)

    def opened(address):
        threading.Thread(target=visit, args=(address,)).start()
        if fails:
            raise webbrowser.Error("could not locate runnable browser")
        return False

    monkeypatch.setattr(webbrowser, "open", opened)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
    try:
        main(["explore", str(home / "t.parquet")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert b"</html>" in pages[0]
    said = " ".join(capsys.readouterr().out.split())
    assert "look at http://127.0.0.1:" in said
    assert "no browser could be started here: open the address yourself" in said


def test_an_index_whose_files_are_empty_is_built_anew(tmp_path, capsys):
    pytest.importorskip("usearch", reason="needs usearch: pip install 'crosslevel[search]'")
    features, _ = crowds([20, 20])
    file = write_table(tmp_path / "t.parquet", features)
    line = ["search", str(file), "003.png", "--index=on", "-k", "3", "-o", str(tmp_path / "found.json")]
    main(line)
    first = (tmp_path / "found.json").read_text()
    for emptied in ([], ["*.npy"], ["*.usearch", "*.graph"], ["*"]):
        for pattern in emptied:
            for part in (tmp_path / "t.parquet.index").glob(pattern):
                if part.is_file():
                    part.write_bytes(b"")
        capsys.readouterr()
        main(line)
        assert (tmp_path / "found.json").read_text() == first, emptied
