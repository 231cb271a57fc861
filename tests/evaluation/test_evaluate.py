"""kNN evaluation: the right figures, beside what anybody gets for nothing."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from run_samples import watching_encoders
from sklearn.neighbors import KNeighborsClassifier

from crosslevel import Encoder, load_encoder
from crosslevel.evaluation.evaluate import evaluate
from crosslevel.evaluation.protocols import PIXEL_SIZE
from crosslevel.features.extract import normalize
from crosslevel.models.copies import untrained
from crosslevel.models.encoder import View
from crosslevel.settings.parser import run

COUNTS = {"ant": 40, "bee": 24, "cow": 10}


def write(folder, counts, seed, side=16):
    """Noisy pictures whose brightness differs a little from class to class."""
    rng = np.random.default_rng(seed)
    for c, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 150, (side, side, 3)) + 25 * c
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    home = tmp_path_factory.mktemp("sources")
    return write(home / "train", COUNTS, 0), write(home / "test", dict.fromkeys(COUNTS, 15), 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("run"), 16)


def saved(folder, side):
    torch.manual_seed(1)
    encoder = Encoder("resnet18", True, 0.0625)
    encoder.view = View(side)
    return encoder.save(folder / "encoder.safetensors").parent


def read(folder):
    files = sorted(folder.rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(f)).transpose(2, 0, 1) for f in files])
    return torch.from_numpy(pixels), np.array([list(COUNTS).index(f.parent.name) for f in files])


def reference(features, labels, queries, k, temperature):
    """scikit-learn's classifier with the same weights on the same features."""
    model = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature))
    return model.fit(features, labels).predict(queries)


def call(trained, sources, *options):
    options = ["--device=cpu", "--precision=fp32", *options]
    test = [] if sources[1] is None else [f"--test={sources[1]}"]
    return run(evaluate, [str(trained), str(sources[0]), *test, *options])


def knn(trained, sources, *options):
    return call(trained, sources, *options).popitem()[1]


def test_the_figures_equal_scikit_learn(trained, sources):
    figures = knn(trained, sources, "--k=9")
    (bank, labels), (queries, truth) = read(sources[0]), read(sources[1])
    encoders = {"trained encoder": load_encoder(trained), "untrained encoder": untrained(load_encoder(trained), 0)}
    for name, encoder in encoders.items():
        with torch.no_grad():
            features = [encoder.eval()(normalize(part, View(16))).numpy() for part in (bank, queries)]
        predicted = reference(features[0], labels, features[1], 9, 0.1)
        assert figures[name]["top1"] == pytest.approx(100 * np.mean(predicted == truth), abs=1e-4)
        recalls = [np.mean(predicted[truth == c] == c) for c in range(3)]
        assert figures[name]["balanced"] == pytest.approx(100 * np.mean(recalls), abs=1e-4)
        shots = [figures[name][split] for split in ("many", "medium", "few")]
        assert shots == pytest.approx([100 * r for r in recalls], abs=1e-4)


def test_raw_pixels_are_compared_by_their_own_cosine(tmp_path):
    """Of images that have the size at which pixels are compared."""
    sources = [write(tmp_path / name, COUNTS, seed, PIXEL_SIZE) for seed, name in enumerate(("train", "test"))]
    figures = knn(saved(tmp_path, PIXEL_SIZE), sources, "--k=9")["raw pixels"]
    (bank, labels), (queries, truth) = read(sources[0]), read(sources[1])

    features = [part.flatten(1).float().numpy() / 127.5 - 1 for part in (bank, queries)]
    predicted = reference(features[0], labels, features[1], 9, 0.1)
    assert figures["top1"] == pytest.approx(100 * np.mean(predicted == truth), abs=1e-4)


def test_the_record_says_how_the_figures_were_made(trained, sources, capsys):
    """Of 74 labelled images a tenth votes."""
    found = call(trained, sources, "--protocol=clustering,knn")
    assert list(found) == ["clustering", "kNN, k = 7, T = 0.1"]
    results = json.loads((trained / "evaluation.json").read_text())["results"]
    record = next(r for r in results if r["protocol"] == "kNN, k = 7, T = 0.1")
    figures = found[record["protocol"]]
    assert record["accuracy_percent"] == figures
    assert record["settings"] == {"k": 7, "temperature": 0.1}
    assert (record["images"], record["test"]) == (str(sources[0]), str(sources[1]))
    said = capsys.readouterr().out.split("kNN, k")[1]
    for name, row in figures.items():
        # In a narrow terminal a name goes on in the next line.
        line = next(line for line in said.splitlines() if line.startswith(f"│ {name.split()[0]} "))
        assert all(f"{value:.1f}" in line for value in row.values())
        low, high = record["interval_percent"][name]["top1"]
        assert low <= row["top1"] <= high
        assert f"{row['top1']:.1f} ±{(high - low) / 2:.1f}" in line


def test_protocols_add_to_the_record_and_share_their_features(trained, sources, tmp_path):
    shutil.copy(trained / "encoder.safetensors", tmp_path)
    encoded, once = [], 2 * (sum(COUNTS.values()) + 15 * len(COUNTS))  # two encoders on two sources
    with watching_encoders(lambda network, images: encoded.append(len(images))):
        call(tmp_path, sources, "--protocol=knn,retrieval,linear", "--linear.epochs=2")
        assert sum(encoded) == once
        call(tmp_path, sources, "--protocol=clustering,knn")
        assert sum(encoded) == once
        call(tmp_path, sources, "--cache=false")
        assert sum(encoded) == 2 * once
    results = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert {r["protocol"] for r in results} == {"kNN, k = 7, T = 0.1", "retrieval, by class", "linear", "clustering"}


def test_fine_tuning_protocols_stand_beside_training_from_scratch(trained, sources, tmp_path):
    shutil.copy(trained / "encoder.safetensors", tmp_path)
    options = ["--semi.epochs=1", "--semi.fractions=[0.2]", "--transfer.epochs=1", "--linear.epochs=2"]
    found = call(tmp_path, sources, "--protocol=semi,transfer", *options)
    assert list(found) == ["semi-supervised, 20 % of labels", "transfer, linear", "transfer, fine-tuned"]
    for title in ("semi-supervised, 20 % of labels", "transfer, fine-tuned"):
        assert list(found[title]) == ["untrained encoder", "trained encoder"]


@pytest.mark.parametrize(
    "options", [[], ["--protocol=semi", "--semi.epochs=1", "--semi.fractions=[0.2]"], ["--protocol=retrieval"]]
)
def test_test_images_that_are_in_the_training_set_are_told(trained, sources, tmp_path, capsys, options):
    """Whether a protocol judges raw pixels or not."""
    options.append("--cache=false")
    call(trained, sources, f"--output={tmp_path / 'a.json'}", *options)
    assert "copies of images to learn from" not in capsys.readouterr().out
    mixed = tmp_path / "test"
    shutil.copytree(sources[1], mixed)
    shutil.copy(sources[0] / "ant" / "03.png", mixed / "ant" / "copy.png")
    call(trained, (sources[0], mixed), f"--output={tmp_path / 'b.json'}", *options)
    out = capsys.readouterr().out
    assert "1 of 46 test images are copies of images to learn from, 0 nearly" in out
    assert "ant/copy.png and ant/03.png" in out
    assert out.count("copies of images to learn from") == 1


def test_an_untrained_encoder_has_other_weights_and_leaves_the_random_numbers_alone(trained):
    encoder = load_encoder(trained)
    state = torch.get_rng_state()
    fresh = untrained(encoder, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(fresh.backbone.conv1.weight, encoder.backbone.conv1.weight)
    assert fresh.backbone.conv1.weight.shape == encoder.backbone.conv1.weight.shape


def test_a_class_numbered_differently_in_the_test_set_is_still_itself(trained, sources, tmp_path):
    only = tmp_path / "test"
    only.mkdir()
    for name in ("bee", "cow"):
        (only / name).symlink_to(sources[1] / name)
    whole, part = knn(trained, sources, "--k=9"), knn(trained, (sources[0], only), "--k=9")
    recalls = [whole["trained encoder"][split] for split in ("medium", "few")]
    assert part["trained encoder"]["balanced"] == pytest.approx(np.mean(recalls), abs=1e-4)


OBJECT = """<annotation><filename>{i}.png</filename><object><name>{name}</name><difficult>0</difficult><bndbox>
<xmin>9</xmin><ymin>9</ymin><xmax>40</xmax><ymax>40</ymax></bndbox></object></annotation>"""


def voc(home):
    """Four squares on noise, in the layout of Pascal VOC."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (home / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 90, (64, 64, 3)).astype(np.uint8)
        pixels[8:40, 8:40] = (200, 30, 30) if i % 2 else (30, 30, 200)
        Image.fromarray(pixels).save(home / "JPEGImages" / f"{i}.png")
        (home / "Annotations" / f"{i}.xml").write_text(OBJECT.format(i=i, name=("red", "blue")[i % 2]))
    (home / "ImageSets" / "Main" / "trainval.txt").write_text("0\n1\n2\n3\n")
    (home / "ImageSets" / "Main" / "test.txt").write_text("0\n1\n")
    return home


def test_detection_from_random_and_from_trained_weights(trained, tmp_path, capsys):
    pytest.importorskip("pycocotools", reason="needs pycocotools: pip install 'crosslevel[detection]'")
    shutil.copy(trained / "encoder.safetensors", tmp_path)
    home = voc(tmp_path / "VOC2007")
    short = ["--detection.iterations=2", "--detection.batch_size=2", "--detection.short_side=64", "--workers=0"]
    found = call(tmp_path, (f"{home}:trainval", f"{home}:test"), "--protocol=detection", *short)
    ((title, rows),) = found.items()
    assert title == "detection, c4, 2 iterations"
    assert list(rows) == ["random initialization", "trained encoder"]
    assert all(set(row) == {"AP", "AP50", "AP75"} for row in rows.values())
    results = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert results[0]["accuracy_percent"] == rows
    assert results[0]["settings"]["short_side"] == 64
    out = " ".join(capsys.readouterr().out.split())
    assert "2 of 2 test images are copies of images to learn from, 0 nearly" in out


def flat_folder(tmp_path):
    for i in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_wrong_use_ends_in_one_line(trained, sources, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    unlabelled = flat_folder(tmp_path / "flat")
    more = write(tmp_path / "more", {"ant": 2, "dodo": 2}, 3)
    few = tmp_path / "few.txt"
    few.write_text("ant/00.png\nant/01.png\n")
    wrong = [
        ((unlabelled, sources[1]), [], "no labels"),
        ((sources[0], more), [], "dodo"),
        ((sources[0], None), [], "--test"),
        (sources, ["--protocol=knn,cluster"], "did you mean clustering?"),
        (sources, ["--protocol=semi", f"--semi.list_file={few}"], "2 labelled images for 3 classes"),
        (sources, ["--protocol=linear", "--linear.epochs=0"], "epochs=0"),
        (sources, ["--protocol=clustering", "--clusters=1000"], "clusters=1000"),
        (sources, ["--protocol=detection"], str(sources[0])),
    ]
    for pair, options, named in wrong:
        with pytest.raises(SystemExit) as stop:
            call(trained, pair, *options)
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert said.count("\n") == 1
        assert named in said
