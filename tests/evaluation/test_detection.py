"""Detection: the encoder's weights in torchvision's detector, training that learns and continues, COCO's counting."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from torch import nn

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.sources.annotated.annotations import Objects
from crosslevel.data.sources.annotated.open import annotated
from crosslevel.data.uri import parse
from crosslevel.evaluation.detection import benchmark as protocol
from crosslevel.evaluation.detection.benchmark import Settings, average_precision, detection, published
from crosslevel.evaluation.detection.model import Sizes, detector
from crosslevel.evaluation.detection.training import (
    Checkpoint,
    Diverged,
    Schedule,
    TrainingData,
    fine_tune,
    own_random_numbers,
    reseed,
)
from crosslevel.models import numerics
from crosslevel.models.encoder import Encoder, View
from crosslevel.models.export import export
from crosslevel.utils.device import Hardware
from crosslevel.utils.errors import SourceError

CLASSES = ("disc", "square", "triangle")
CPU = Hardware(torch.device("cpu"), "fp32", "")
SMALL = Sizes((48,), 48, 96)
QUICK = Settings(Schedule(4, 2, 0.1), sizes=SMALL, regions=8)


@pytest.fixture(scope="module")
def pycocotools():
    return pytest.importorskip("pycocotools", reason="needs pycocotools: pip install 'crosslevel[detection]'")


def draw(picture, name, box, colour):
    x1, y1, x2, y2 = box
    pen = ImageDraw.Draw(picture)
    if name == "disc":
        pen.ellipse((x1, y1, x2 - 1, y2 - 1), fill=colour)
    elif name == "square":
        pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=colour)
    else:
        pen.polygon([((x1 + x2) / 2, y1), (x2 - 1, y2 - 1), (x1, y2 - 1)], fill=colour)


def noise(rng, size):
    return Image.fromarray(rng.integers(60, 120, (size, size, 3), np.uint8))


def scene(rng, size):
    """One or two shapes on noise, each class in shades of a colour of its own; and what there is."""
    picture, objects = noise(rng, size), []
    halves = [(0, size // 2), (size // 2, size)][: rng.integers(1, 3)]
    for left, right in halves:
        side = int(rng.integers(18, 32))
        x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(0, size - side + 1))
        kind = int(rng.integers(3))
        colour = rng.integers(0, 60, 3)
        colour[kind] += 180
        draw(picture, CLASSES[kind], (x, y, x + side, y + side), tuple(map(int, colour)))
        objects.append((CLASSES[kind], (x, y, x + side, y + side)))
    return picture, objects


def write_voc(root, split, count, seed, size=64):
    rng = np.random.default_rng(seed)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    keys = [f"{split}{i:03}" for i in range(count)]
    for key in keys:
        picture, objects = scene(rng, size)
        picture.save(root / "JPEGImages" / f"{key}.png")
        items = "".join(
            f"<object><name>{name}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for name, (x1, y1, x2, y2) in objects
        )
        text = f"<filename>{key}.png</filename><size><width>{size}</width><height>{size}</height></size>{items}"
        (root / "Annotations" / f"{key}.xml").write_text(f"<annotation>{text}</annotation>")
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(keys))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Training and test sets in the layout of VOC."""
    root = tmp_path_factory.mktemp("VOC")
    write_voc(root, "train", 100, 0)
    write_voc(root, "test", 30, 1)
    return annotated(parse(f"{root}:train")), annotated(parse(f"{root}:test"))


def narrow(seed=0):
    torch.manual_seed(seed)
    encoder = Encoder("resnet18", True, 0.125)
    encoder.view = View(32)
    return encoder


@pytest.fixture(scope="module")
def trained():
    """An encoder that tells the shapes apart, whatever their colour."""
    rng, encoder = np.random.default_rng(7), narrow()
    pictures, kinds = [], torch.from_numpy(rng.integers(0, 3, 400))
    for kind in kinds:
        picture, side = noise(rng, 32), int(rng.integers(16, 32))
        x, y = (int(v) for v in rng.integers(0, 33 - side, 2))
        colour = rng.integers(0, 40, 3) + 200 * int(rng.integers(2))
        draw(picture, CLASSES[kind], (x, y, x + side, y + side), tuple(map(int, colour)))
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    mean, std = (torch.tensor(v)[:, None, None] for v in encoder.view[1:])
    images = (torch.stack(pictures).float() / 255 - mean) / std
    head = nn.Linear(encoder.num_features, 3)
    optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], 0.1, 0.9, weight_decay=1e-3)
    for _ in range(100):
        index = torch.randint(len(images), (32,))
        loss = nn.functional.cross_entropy(head(encoder(images[index])), kinds[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.eval()


@pytest.mark.slow
def test_a_trained_encoder_learns_to_detect_and_finished_figures_are_kept(
    pycocotools, shapes, trained, tmp_path, capsys, monkeypatch
):
    settings = Settings(Schedule(70, 4, 0.5), sizes=SMALL, regions=32)
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    options = {"settings": settings, "hardware": CPU, "workers": 1, "folder": tmp_path}
    figures = detection(trained, *shapes, console=Console(width=120), **options)
    assert list(figures) == ["random initialization", "trained encoder"]
    # Measured: 55 to 66, after one iteration 2 (docs/numerics.md, "In the tests").
    assert figures["trained encoder"]["AP50"] > 15
    assert figures["trained encoder"]["AP50"] >= figures["trained encoder"]["AP75"] > 0
    said = capsys.readouterr().out
    assert said.count("iterations/s") == 20
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())

    def again(*arguments, name, **options):
        raise RuntimeError(name)

    monkeypatch.setattr(protocol, "fine_tune", again)
    assert detection(trained, *shapes, **options) == figures
    assert [file.name for file in tmp_path.iterdir()] == ["detection.json"]
    # Another encoder has figures of its own; those of the random start still hold.
    with pytest.raises(RuntimeError, match="trained encoder"):
        detection(narrow(1), *shapes, **options)
    with pytest.raises(RuntimeError, match="random initialization"):
        detection(trained, *shapes, **options, seed=1)


@torch.no_grad()
@pytest.mark.parametrize(("name", "small", "width"), [("resnet18", True, 0.125), ("resnet50", False, 0.25)])
def test_the_detector_computes_what_the_encoder_computes(name, small, width):
    torch.manual_seed(0)
    encoder = Encoder(name, small, width).eval()
    images = torch.randn(2, 3, 96, 96)
    maps = encoder.backbone.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)
    c4, fpn = (detector(encoder, 3, kind, sizes=SMALL).eval() for kind in ("c4", "fpn"))
    torch.testing.assert_close(c4.backbone(images), maps[2])
    expected = encoder.backbone.layer4(maps[2])
    # The normalization after conv5 is new: its statistics are still 0 and 1.
    expected = (expected / np.sqrt(1 + 1e-5)).mean((2, 3))
    torch.testing.assert_close(c4.roi_heads.box_head(maps[2]), expected)
    for level, found in zip(maps, fpn.backbone.body(images).values(), strict=True):
        torch.testing.assert_close(found, level)
    stride = 96 // maps[2].shape[-1]
    assert c4.rpn.anchor_generator.sizes == (tuple(n * stride for n in (2, 4, 8, 16, 32)),)
    assert c4.transform.image_mean == list(encoder.view.mean)


def test_a_usual_stem_gets_the_published_anchors():
    kinds = [detector(Encoder("resnet18", False), 20, kind).rpn.anchor_generator.sizes for kind in ("c4", "fpn")]
    assert kinds == [((32, 64, 128, 256, 512),), ((32,), (64,), (128,), (256,), (512,))]


@pytest.mark.parametrize("kind", ["c4", "fpn"])
@pytest.mark.parametrize("batchnorm", ["train", "frozen"])
def test_a_step_changes_all_weights_but_frozen_normalizations(shapes, kind, batchnorm):
    torch.manual_seed(0)
    encoder = Encoder("resnet18", True, 0.125, zero_init_last=False)
    reseed(0)
    model = detector(encoder, 3, kind, sizes=SMALL, regions=8, batchnorm=batchnorm)
    norms = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if "BatchNorm" in type(module).__name__
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    assert len(norms) >= 4 * 20
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step(model, shapes[0], Schedule(1, 4, 2.0))
    same = {key for key, value in model.state_dict().items() if torch.equal(value, before[key])}
    assert same == (norms if batchnorm == "frozen" else set())


def step(model, images, schedule, checkpoint=None, show=lambda done, loss: None):
    data = TrainingData(images, schedule.batch_size, 0, 1, BadFiles())
    kept = checkpoint or Checkpoint(None, "", 0)
    fine_tune(model, data, schedule, name="x", seed=0, device=CPU.device, checkpoint=kept, show=show)


def test_a_killed_training_ends_as_an_uninterrupted_one(shapes, tmp_path):
    schedule = Schedule(5, 2, 0.1)

    def model():
        reseed(0)
        return detector(narrow(), 3, sizes=SMALL, regions=8)

    whole, killed = model(), model()
    step(whole, shapes[0], schedule)

    def stop(done, loss):
        if done == 4:
            raise KeyboardInterrupt

    file = tmp_path / "x.ckpt"
    with pytest.raises(KeyboardInterrupt):
        step(killed, shapes[0], schedule, Checkpoint(file, "key", 0), stop)
    seen = []
    continued = model()
    torch.rand(7)  # what is random is drawn from the seed, whatever was drawn before
    step(continued, shapes[0], schedule, Checkpoint(file, "key", 0), lambda done, loss: seen.append(done))
    assert seen == [4, 5]
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in continued.state_dict().items())
    optimizer = torch.optim.SGD(whole.parameters(), 1.0)
    assert Checkpoint(file, "another", 0).restore(whole, optimizer) == 0


def test_the_caller_s_random_numbers_are_left_alone():
    state = torch.get_rng_state()
    with own_random_numbers(CPU.device):
        reseed(1, 2)
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    reseed(1, 2)
    assert torch.equal(torch.rand(3), first)


def test_every_epoch_has_every_image_once(shapes):
    data = TrainingData(shapes[0], 30, 5, 1, BadFiles())
    places = data._places(0)
    order = [place for _ in range(10) for place in next(places)]
    for epoch in range(3):
        assert sorted(order[100 * epoch : 100 * (epoch + 1)]) == list(range(100))
    assert order[:100] != order[100:200]
    assert next(data._places(7)) == order[210:240]


def test_the_schedule_is_the_published_one(shapes):
    voc = published(shapes[0]).schedule
    assert (voc.iterations, voc.batch_size) == (24_000, 16)
    rates = [voc.at(n) for n in (0, 50, 100, 17_999, 18_000, 21_999, 22_000, 23_999)]
    # detectron2: a linear rise from a thousandth, over 100 iterations
    rise = 0.02 * (0.001 + 0.999 / 2)
    assert rates == pytest.approx([0.02e-3, rise, 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002])
    short = Schedule(240, 8)
    assert [short.at(n) for n in (24, 179, 180, 220)] == pytest.approx([0.01, 0.01, 0.001, 0.0001])
    crowds = annotated_copy(shapes[0], ignored="crowd")
    coco = published(crowds)
    assert [coco.schedule.at(n) for n in (119_999, 120_000, 160_000)] == pytest.approx([0.02, 0.002, 0.0002])
    assert coco.sizes.train[0] == 640


def annotated_copy(images, **changes):
    copied = images.numbered_as(images)
    for name, value in changes.items():
        setattr(copied, name, value)
    return copied


def iou(a, b):
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area[0] + area[1] - width * height), width * height / area[0]


def reference_ap(predictions, truth, threshold, crowd):
    """Precision at 101 recalls, averaged, and over classes (COCO), as a loop."""
    averages = []
    for label in range(3):
        ranked = [
            (float(found["scores"][k]), i, found["boxes"][k].tolist())
            for i, found in enumerate(predictions)
            for k in range(len(found["boxes"]))
            if found["labels"][k] == label
        ]
        wanted = sum(int(((o.labels == label) & ~o.ignored).sum()) for o in truth)
        if not wanted:
            continue
        met, verdicts = set(), []
        for _, i, box in sorted(ranked, key=lambda row: -row[0]):
            best, best_overlap, excused = None, threshold, False
            for j in range(len(truth[i].labels)):
                if truth[i].labels[j] != label:
                    continue
                union, inside = iou(box, truth[i].boxes[j].tolist())
                if truth[i].ignored[j]:
                    excused |= (inside if crowd else union) >= threshold
                elif (i, j) not in met and union >= best_overlap:
                    best, best_overlap = (i, j), union
            if best is not None:
                met.add(best)
                verdicts.append(1)
            elif not excused:
                verdicts.append(0)
        hits = np.cumsum(verdicts)
        recall, precision = hits / wanted, hits / np.arange(1, len(hits) + 1)
        points = [max(precision[recall >= r], default=0) for r in np.linspace(0, 1, 101)]
        averages.append(np.mean(points))
    return 100 * np.mean(averages)


@pytest.mark.parametrize("ignored", ["difficult", "crowd"])
@pytest.mark.parametrize("seed", range(3))
def test_average_precision_equals_a_loop(pycocotools, ignored, seed):
    """Ignored objects included: several boxes on one of them, and small ones inside it."""
    rng = np.random.default_rng(seed)
    truth, predictions = [], []
    for _ in range(12):
        corner = rng.uniform(0, 60, (6, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(15, 40, (6, 2))], 1)
        labels, hidden = rng.integers(0, 3, 6), rng.random(6) < 0.35
        truth.append(Objects(torch.tensor(boxes).float(), torch.tensor(labels), torch.tensor(hidden)))
        guess = np.concatenate([boxes, boxes, boxes * 0.5 + boxes.mean(1, keepdims=True) * 0.1, boxes])
        guess = guess + rng.normal(0, 2.5, guess.shape)
        guess[:, 2:] = np.maximum(guess[:, 2:], guess[:, :2] + 1)
        numbers = np.where(rng.random(24) < 0.8, np.tile(labels, 4), rng.integers(0, 3, 24))
        scores = rng.permutation(24 * 12)[:24] / 288
        predictions.append(
            {"boxes": torch.tensor(guess).float(), "labels": torch.tensor(numbers), "scores": torch.tensor(scores)}
        )
    for i, found in enumerate(predictions):
        found["scores"] = found["scores"].float() + i * 1e-5  # no ties
    figures = average_precision(predictions, truth, ignored)
    thresholds = np.linspace(0.5, 0.95, 10)
    expected = [reference_ap(predictions, truth, threshold, ignored == "crowd") for threshold in thresholds]
    assert figures["AP50"] == pytest.approx(expected[0], abs=1e-4)
    assert figures["AP75"] == pytest.approx(expected[5], abs=1e-4)
    assert figures["AP"] == pytest.approx(np.mean(expected), abs=1e-4)


@torch.no_grad()
def test_an_exported_file_gives_the_same_start(trained, tmp_path):
    trained.save(tmp_path / "encoder.safetensors")
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(2))]
    outputs = []
    for ending in ("safetensors", "pth"):
        file = export(str(tmp_path), "timm", str(tmp_path / f"again.{ending}"))
        again = Encoder("resnet18", True, 0.125, weights=str(file))
        again.view = trained.view
        for encoder in (trained, again):
            reseed(3)
            model = detector(encoder, 3, sizes=SMALL).eval()
            outputs.append(model(images)[0])
    for found in outputs[1:]:
        assert all(torch.equal(value, found[key]) for key, value in outputs[0].items())


def test_bfloat16_stays_inside_the_network(trained):
    reseed(0)
    plain = detector(trained, 3, sizes=SMALL).eval()
    reseed(0)
    mixed = detector(trained, 3, sizes=SMALL, hardware=Hardware(torch.device("cpu"), "bf16", "")).eval()
    image = torch.rand(1, 3, 48, 48)
    with torch.no_grad():
        expected, found = plain.backbone(image), mixed.backbone(image)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("kind", ["c4", "fpn"])
def test_layers_that_bfloat16_gets_wrong_are_told_once_for_both_detectors(tmp_path, pycocotools, monkeypatch, kind):
    write_voc(tmp_path, "train", 2, 0)
    data = annotated(parse(f"{tmp_path}:train"))
    measured, avoided = set(), set()

    def wrong(layer, x, hardware):
        measured.add(layer)
        return "output" if tuple(layer.weight.shape[:2]) == (64, 64) else ""

    monkeypatch.setattr(numerics, "_wrong", wrong)
    monkeypatch.setattr(numerics, "_in_float32", lambda layer, x: avoided.add(layer) or type(layer).forward(layer, x))
    console = Console(file=io.StringIO(), width=500)
    figures = detection(
        narrow(), data, data, console=console, workers=1,
        settings=QUICK._replace(kind=kind, schedule=Schedule(1, 2, 0.1)),
        hardware=Hardware(torch.device("cpu"), "bf16", ""),
    )  # fmt: skip
    assert console.file.getvalue().count("bf16 is wrong on this processor: the output of ") == 1
    assert {tuple(layer.weight.shape[:2]) for layer in avoided} == {(64, 64)}
    assert len(avoided) == 2 * 3  # conv5's last three, in each detector
    assert len(measured) > 20
    assert len(figures) == 2


def test_unreadable_images_are_recorded_and_others_take_their_place(tmp_path, pycocotools):
    write_voc(tmp_path, "train", 4, 0)
    write_voc(tmp_path, "test", 4, 1)
    for key in ("train001", "test002"):
        (tmp_path / "JPEGImages" / f"{key}.png").write_bytes(b"no picture")
    bad = BadFiles()
    train, test = annotated(parse(f"{tmp_path}:train")), annotated(parse(f"{tmp_path}:test"))
    known = sorted(train.names() & test.names())
    test.objects = [keep(o, [test.classes.index(name) for name in known]) for o in test.objects]
    figures = detection(narrow(), train, test, settings=QUICK, hardware=CPU, bad=bad)
    assert all(set(row) == {"AP", "AP50", "AP75"} for row in figures.values())
    assert sorted(path.rpartition("/")[2] for path in bad.reasons) == ["test002.png", "train001.png"]


def keep(objects, labels):
    wanted = torch.isin(objects.labels, torch.tensor(labels))
    return Objects(*(column[wanted] for column in objects))


def test_a_loss_that_is_no_number_is_named(pycocotools, shapes):
    settings = QUICK._replace(schedule=Schedule(30, 2, 1e12, warmup=0))
    with pytest.raises(Diverged, match=r"detection, random initialization: (loss_\w+ is nan,? )+in iteration 3: lower"):
        detection(narrow(), *shapes, settings=settings, hardware=CPU)


def test_wrong_use_ends_in_one_line(pycocotools, shapes, monkeypatch):
    train, test = shapes
    fewer = annotated_copy(train, objects=[keep(o, [0, 1]) for o in train.objects])
    nothing = annotated_copy(test, objects=[o._replace(ignored=torch.ones_like(o.ignored)) for o in test.objects])
    vit = Encoder("vit_tiny_patch16_224", image_size=32)
    wrong = [
        ((narrow(), fewer, test), QUICK, SourceError, "lacks: triangle"),
        ((narrow(), nothing, test), QUICK, SourceError, "has an object that is not ignored"),
        ((narrow(), train, nothing), QUICK, SourceError, "nothing to find"),
        ((vit, train, test), QUICK, ValueError, "not vit_tiny_patch16_224"),
        ((narrow(), train, test), QUICK._replace(schedule=Schedule(0)), ValueError, "iterations=0"),
        ((narrow(), train, test), QUICK._replace(sizes=Sizes(())), ValueError, "sizes.train=0"),
        ((narrow(), train, test), QUICK._replace(schedule=Schedule(rate=-1.0)), ValueError, "rate=-1.0"),
    ]
    for arguments, settings, kind, named in wrong:
        with pytest.raises(kind) as caught:
            detection(*arguments, settings=settings, hardware=CPU)
        assert named in str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(protocol.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'crosslevel\[detection\]'"):
        detection(narrow(), train, test, settings=QUICK, hardware=CPU)


def test_a_damaged_record_is_measured_again(tmp_path):
    store = protocol._Store(tmp_path)
    store.keep("a", "key", {"AP": 1.0})
    assert store.found("a", "key") == {"AP": 1.0}
    assert store.found("a", "another") is None
    assert json.loads((tmp_path / "detection.json").read_text())["a"]["figures"] == {"AP": 1.0}
    (tmp_path / "detection.json").write_text("{")
    assert store.found("a", "key") is None
