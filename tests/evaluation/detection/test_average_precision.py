"""Average precision as COCO counts it."""

import numpy as np
import pytest
import torch

from crosslevel.data.sources.annotated.annotations import Objects
from crosslevel.evaluation.detection.benchmark import average_precision


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
