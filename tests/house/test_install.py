"""What ``pip install crosslevel`` brings: a wheel that is whole, and enough for the main verbs without any extra."""

import os
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from run_samples import write_images

ROOT = Path(__file__).parents[2]
CODE = """
import sys
import crosslevel
from crosslevel.cli import main

print("at", crosslevel.__file__, file=sys.stderr)
for line in sys.argv[1:]:
    status = 0
    try:
        main(line.split())
    except SystemExit as ended:
        status = ended.code or 0
    print("status", status, line, file=sys.stderr, flush=True)
features = crosslevel.load("run").transform("photos/cat/000.png")
print("features", *features.shape, file=sys.stderr)
"""
SMALL = "--encoder.width=0.0625 --views.size=16 --batch_size=8 --epochs=1 --device=cpu --workers=0"
LINES = [
    "inspect photos --device cpu",
    "pack photos --output packed --size 16",
    f"train packed --run run {SMALL}",
    "embed run photos --device cpu",
    "evaluate run photos --test photos --protocol knn,linear,clustering,retrieval --linear.epochs=1 --device cpu",
    "export run -o weights.safetensors",
    "subset photos@imbalance=2 -o list.txt",
]
NEEDS_AN_EXTRA = "tune photos"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment with nothing in it but the package as its wheel has it, and what that requires."""
    pytest.importorskip("setuptools")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("environment")
    shutil.copytree(ROOT / "crosslevel", source / "crosslevel", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-index"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", site, source], check=True)
    for name in required(site):
        link_distribution(metadata.distribution(name), site)
    return folder, site


def required(site):
    """The names of the distributions that an installation without extras brings, as far as they are here."""
    (own,) = metadata.distributions(path=[str(site)])
    found, waiting = set(), [(Requirement(text), "") for text in own.requires]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        wanted = (requirement.name, tuple(requirement.extras))
        if wanted not in found:
            found.add(wanted)
            further = metadata.requires(requirement.name) or []
            waiting += [(Requirement(text), extra) for text in further for extra in ("", *requirement.extras)]
    return {name for name, _ in found}


def link_distribution(distribution, site):
    for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}:
        if not (site / top).exists():
            (site / top).symlink_to(distribution.locate_file(top))


def test_a_wheel_has_every_file_of_the_package(environment):
    def files(folder):
        kept = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
        return {str(file.relative_to(folder)) for file in kept}

    assert files(environment[1] / "crosslevel") == files(ROOT / "crosslevel")


@pytest.mark.slow
def test_the_main_verbs_need_no_extra(environment, tmp_path):
    folder, site = environment
    assert not any((site / name).exists() for name in ("optuna", "torchmetrics", "onnx", "av", "datasets", "pytest"))
    write_images(tmp_path / "photos")
    done = subprocess.run(
        [folder / "bin" / "python", "-c", CODE, *LINES, NEEDS_AN_EXTRA], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": ""}, check=False,
    )  # fmt: skip
    status = re.findall(r"^status (\d+) (.*)$", done.stderr, re.MULTILINE)
    assert status == [*(("0", line) for line in LINES), ("2", NEEDS_AN_EXTRA)], done.stderr
    assert f"at {site}" in done.stderr
    assert "pip install 'crosslevel[tune]'" in done.stderr
    assert "features 1 32" in done.stderr
