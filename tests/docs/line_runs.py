"""Each command of Crosslevel's on the pages: what is added so that it takes a moment, how it is run, what it leaves."""

import contextlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from doc_samples import BLOCKS, PARTS, ROOT, TINY
from forked import forked_training
from line_samples import Browser, keyboard
from run_samples import losses, write_images

from crosslevel.cli import COMMANDS, main
from crosslevel.models.encoder import Encoder
from crosslevel.settings.command import Command
from crosslevel.settings.parser import prepared, run
from crosslevel.tuning.tune import tune

FEW = [*(f"--{name}={value}".lower() for name, value in TINY.items()), "--warmup_epochs=0", "--cld.groups=4"]
SMALL = [f"--encoder.width={PARTS['encoder']['width']}", f"--views.size={PARTS['views']['size']}"]
HERE = ["--device=cpu", "--workers=0"]
IMAGES = "classes=2,objects=8,size=16,imbalance=2"
LESS = {
    "train": FEW,
    "tune": [*(word for word in FEW if "monitor" not in word and "report" not in word), *SMALL, "--budget=1"],
    "demo": [
        f"--images=turntable,{IMAGES},frames=4", f"--test=turntable:test,{IMAGES},test_objects=2,test_frames=3",
        "--epochs=1", "--width=0.0625", "--device=cpu",
    ],
    "evaluate": [*HERE, "--linear.epochs=2", "--k=3"],
    "curate": ["--device=cpu", "-n=8", "--outliers=keep"],
    "explore": ["--device=cpu"],
    "pack": ["--workers=0"],
    **dict.fromkeys(("inspect", "embed", "search", "classify"), HERE),
}  # fmt: skip
"""What is added to a command, by its verb; what comes later on a line counts."""
LARGE = re.compile(r"--encoder.name (vit|hf-hub)|--config")
"""Trainings that SMALL is not added to: their networks have other sizes, or a file has said so."""
ALONE = {"--devices": "1", "--nodes": "1", "--launcher": "local", "--engine": "local", "--epoch_size": "16"}
"""What takes the place of a line's own value, so that one process does it; see SEVERAL."""

RANKS, RAY = "training/loop/test_ranks.py::test_", "training/cluster/test_ray.py::test_"
SEVERAL = {
    "train photos/ --run runs/photos --nodes 4 --devices 8":
        f"{RANKS}two_machines_of_two_processes_have_the_losses_of_one_with_four",
    "train photos/ --run runs/large --nodes 4 --devices 8 --strategy fsdp --encoder.name vit_giant_patch14_224":
        f"{RANKS}encoders_in_parts_have_the_losses_of_whole_ones",
    "train imagenet/train --recipe imagenet-mocov2-cld-normmlp --devices 8 --batch_size 64 --cld.groups 64 "
    "--method.splits 1":
        f"{RANKS}losses_are_those_of_one_process_with_the_whole_batch",
    "train photos/ --run runs/photos --launcher ray --nodes 4 --devices 8":
        f"{RAY}a_training_on_two_machines_starts_again_when_one_is_lost",
    "embed runs/photos photos/ -o features/ --engine ray":
        f"{RAY}a_lost_node_costs_time_only",
    "pack s3://bucket/photos-*.tar -o s3://bucket/packed --engine ray":
        f"{RAY}a_pack_and_an_inspection_are_those_of_one_machine",
    "inspect s3://bucket/photos-*.tar -o inspection/ --engine ray":
        f"{RAY}a_pack_and_an_inspection_are_those_of_one_machine",
}  # fmt: skip
"""Lines for many processes, devices or machines, which are run as one process; and the test of several."""
ELSEWHERE = {"subset": "tests/data/test_subset.py"}
"""Verbs that no block of a page has."""
NEEDS = {
    "videos/": "av", "scans/": "pydicom", "s3://": "s3fs", "https://": "aiohttp", "onnx": "onnxscript",
    "tune ": "optuna", ".lance": "lance",
}  # fmt: skip
"""Packages of extras, by what of a line needs them."""

OUTPUT = {
    "embed": "features.parquet", "classify": "predictions.parquet", "curate": "curated.txt",
    "export": "encoder-onnx.onnx", "tune": "runs/tune/*", "demo": "runs/demo",
}  # fmt: skip
"""Where a command writes to, if its line has no ``-o``."""
LEAVES = {
    "inspect": ("inspect.json", "inspect.html", "duplicates.csv"),
    "search": ("search.json", "search.html"),
    "explore": ("index.html",),
    "tune": ("config.yaml", "trials.csv", "report.html", "study.db"),
    "demo": ("report.html", "plain/encoder.safetensors", "cld/encoder.safetensors"),
}
"""The files in the folder that a command writes."""
BESIDE = {"curate": (".txt", ".csv", ".html"), "compare": (".md", ".html")}
"""The files of this name that it writes; of all others the output is one file, or a folder of some."""
SAYS = {
    "inspect": r"│ images +│ \d+ +│",
    "search": r"\n +1 +[\d.]+  (cat|dog)/\d+\.png\n",
    "explore": r"next: look at http://127\.0\.0\.1:\d+/\S+ \(Ctrl-C ends\)\nended\n$",
    "recipes": r"\ncifar10-moco-cld ",
    "push": r'next: timm.create_model\("hf-hub:owner/name"',
    "pack": r"sent to s3://bucket/packed; next: crosslevel train s3://bucket/packed",
    "evaluate": r"kNN, k = 3",
}
"""What a command prints that is asked for nothing else."""


def all_lines():
    """The words of each command, with the block that has it first."""
    found = {}
    for block in BLOCKS:
        for words in block.commands if block.kind == "shell" else ():
            if words[0] in ("crosslevel", "srun"):
                words = words[words.index("crosslevel") + 1 :]  # noqa: PLW2901
            elif words[0] != "sbatch":
                continue
            found.setdefault(tuple(words), block)
    return found


LINES = all_lines()
FIRST = ("CONTRIBUTING.md", "README.md", "encoder.md", "evaluation.md", "index.md", "natural.md", "own-folder.md")
"""Pages whose lines take about half of the time of all."""


def cases(first):
    """Those of the first pages, or of the others, as pytest's parameters."""
    return [
        pytest.param(list(words), id=f"{block}-{' '.join(words)}".replace("/", "."))
        for words, block in LINES.items()
        if (block.page in FIRST) == first
    ]


def smaller(words):
    """What is added to a line."""
    more = list(LESS.get(words[0], ()))
    if words[0] == "train" and not LARGE.search(" ".join(words)):
        more += SMALL
    if "--resume" in words:
        more += ["--epochs=2"]
    return more + [f"{option}={value}" for option, value in ALONE.items() if option in words]


def check(words, outside, capsys, monkeypatch):
    """Read a line as it is printed, run it with what makes it small, and look at what it leaves."""
    for part, package in NEEDS.items():
        if part in " ".join(words) and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'crosslevel[test]'")
    with at_hand(words):
        if words[0] == "sbatch":
            words = queued(words)
        assert prepared(Command.of(COMMANDS[words[0]][0], words[0]), words[1:]) is not None
        remove(words)
        browser, before = Browser(), states()
        monkeypatch.setattr("webbrowser.open", browser)
        with keyboard():
            called([word.replace("https://host", outside.address) for word in words])
        said = capsys.readouterr().out
        written = {file for file, state in states().items() if before.get(file) != state}
        looked_at(words, written, said)
    if words[0] == "explore" and "--export" not in words:
        assert "<title>" in browser.pages[0]
    if words[0] == "push":
        assert {"model.safetensors", "config.json", "README.md"} <= set(outside.hub.files["owner/name"])


def called(words):
    """The trials of a search are forks, and not new processes."""
    if words[0] == "tune":
        run(tune, [*words[1:], *smaller(words)], training=forked_training)
    else:
        main([*words, *smaller(words)])


def queued(words):
    """The command that a script for SLURM comes to, when it is run for the first time."""
    remove(["train", "--run", words[3]])
    stub = Path("bin", "crosslevel").resolve()
    stub.parent.mkdir(exist_ok=True)
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > called\n')
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", ROOT / words[1], *words[2:]], env=environment, check=True)
    shutil.rmtree(stub.parent)
    return Path("called").read_text().splitlines()


@contextlib.contextmanager
def at_hand(words):
    """What this line takes as there and others do not."""
    if words[0] == "tune":
        usual = set(Path("photos").rglob("*.png"))
        write_images(Path("photos"), count=40)
        try:
            yield
        finally:
            for file in set(Path("photos").rglob("*.png")) - usual:
                file.unlink()
    elif words[0] == "compare":
        shutil.rmtree("runs/plain")
        shutil.copytree("runs/photos", "runs/plain")
        yield
    elif words[0] == "push" or "--resume" in words:
        with restored(Path("runs/photos")) as folder:
            if words[0] == "push":  # of what timm has, too
                Encoder("test_resnet", small_images=False).save(folder / "encoder.safetensors")
            else:
                remove(["train", "--run", "runs/photos"])
                main(["train", "photos/", "--run=runs/photos", *words[words.index("--method") :], *FEW, *SMALL])
            yield
    else:
        yield


@contextlib.contextmanager
def restored(folder):
    aside = folder.with_name(f"{folder.name}-aside")
    shutil.copytree(folder, aside)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)


def option(words, *names):
    return next((value for word, value in itertools.pairwise(words) if word in names), None)


def remove(words):
    """What the command is to leave."""
    for name in ("-o", *(["--run"] if words[0] == "train" else [])):
        place = Path(option(words, name) or "nowhere")
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)


def states():
    """Of each file in the folder, what changes when it is written."""
    files = {}
    for folder, _, names in os.walk("."):
        for name in names:
            about = os.stat(os.path.join(folder, name), follow_symlinks=False)
            files[os.path.relpath(os.path.join(folder, name))] = about.st_mtime_ns, about.st_ino, about.st_size
    return files


def looked_at(words, written, said):
    """A command has left what its page says, or printed it."""
    verb, output = words[0], option(words, "-o", "--export") or OUTPUT.get(words[0])
    if verb == "train":
        [folder] = {Path(file).parent for file in written if Path(file).name == "encoder.safetensors"}
        assert {f"{folder}/metrics.csv", f"{folder}/checkpoints/last.ckpt"} <= written
        assert str(folder) == (option(words, "--run", "--resume") or str(folder)).rstrip("/")
        assert (folder / "config.yaml").exists()
        assert losses(folder)
        assert f"{folder}/encoder.safetensors; next:" in said
        return
    if verb == "evaluate":
        [file] = [file for file in written if Path(file).name == "evaluation.json"]
        protocols = {row["protocol"].partition(",")[0].lower() for row in json.loads(Path(file).read_text())["results"]}
        assert protocols >= set((option(words, "--protocol") or "knn").split(","))
    if output is None or "://" in output or (verb == "export" and "-o" not in words and "timm:" not in words[1]):
        assert re.search(SAYS[verb], said), said
        return
    output = output.rstrip("/")
    wanted = [f"{output}/{name}" for name in LEAVES.get(verb, ())]
    wanted += [str(Path(output).with_suffix(end)) for end in BESIDE.get(verb, ())]
    assert "*" in output or Path(output).name in said
    for pattern in wanted or [f"{output}/*" if Path(output).is_dir() else output]:
        assert any(fnmatch(file, pattern) for file in written), (pattern, written)
    if verb in ("embed", "classify") and output.endswith(".parquet"):
        table = pq.ParquetFile(output)
        assert table.metadata.num_rows > 1
        names = set(table.schema_arrow.names)
        assert ({"image", "loss"} & names) == {
            column for name, column in (("--thumbnails", "image"), ("--loss", "loss")) if name in words
        }
