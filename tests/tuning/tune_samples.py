"""Images to search on, and stand-ins for trainings."""

import io
import json

import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")

from crosslevel.settings.parser import run
from crosslevel.tuning import trial
from crosslevel.tuning.tune import tune

IMAGES = "turntable:train,classes=2,objects=20,frames=4,size=16,imbalance=2"
TINY = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--device=cpu"]


class Told(trial.Channel):
    """Figures for the test, and always leave to go on."""

    def __init__(self):
        super().__init__(io.StringIO(), None)

    def tell(self, figures):
        self.out.write(json.dumps(figures) + "\n")


def photos(folder, count=40):
    """Noisy pictures in two classes' folders."""
    noise = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(0, 255, (16, 16, 3), generator=noise, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i:03}.png")
    return folder


def base(folder, **changed):
    """The settings that all trials have in common, as `tune` writes them."""
    tree = {
        "encoder": {"width": 0.0625}, "views": {"size": 16}, "batch_size": 8, "device": "cpu", "epochs": 2, "seed": 0,
        "method": {"class_path": "crosslevel.methods.MoCo"},
    }  # fmt: skip
    file = folder / "base.yaml"
    file.write_text(yaml.safe_dump(tree | changed))
    return file


def scores(images, base, options, folder, threads, epochs=1):
    """Figures in place of a training."""
    for _ in range(epochs):
        yield {"combined": 0.5, "effective_rank": 5.0, "mrr": 0.5}


def tune_(source, *options, training=scores):
    """A search without trainings, unless one is given."""
    return run(tune, [str(source), *TINY, "--epochs=1", "--trials=2", *options], training=training)


def annotated(folder, count=40):
    """A COCO file and its images, two objects in each."""
    (folder / "annotations").mkdir(parents=True)
    files = sorted((photos(folder / "made", count) / "cat").iterdir())
    (folder / "made" / "cat").rename(folder / "val2017")
    boxes = [(i, box) for i in range(len(files)) for box in ([0, 0, 8, 8], [6, 6, 9, 9])]
    tree = {
        "images": [{"id": i, "file_name": file.name, "width": 16, "height": 16} for i, file in enumerate(files)],
        "annotations": [
            {"id": n, "image_id": i, "bbox": box, "category_id": 1 + n % 2, "iscrowd": 0, "area": 64}
            for n, (i, box) in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    file = folder / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps(tree))
    return file
