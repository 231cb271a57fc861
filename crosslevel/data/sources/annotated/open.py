"""Annotated images, in the layouts of Pascal VOC, COCO and YOLO."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from crosslevel.data.sources.annotated.annotations import Annotated
from crosslevel.data.sources.annotated.coco import open_coco
from crosslevel.data.sources.annotated.voc import open_voc
from crosslevel.data.sources.annotated.yolo import ENDINGS, open_yolo
from crosslevel.data.uri import Part, Source
from crosslevel.utils.errors import SourceError


def annotated(source: Source) -> Annotated:
    """The annotated images of ``source``.

    - Pascal VOC: ``VOCdevkit/VOC2007:trainval``, a folder with JPEGImages, Annotations and ImageSets/Main, and the
      name of a list there;
    - COCO: ``annotations/instances_val2017.json:val2017``, a file of instances and the folder of its images, which
      may be left out where the folders are named as in the official data set;
    - YOLO: ``dataset/data.yaml:train``, the YAML file that names classes and splits, and the name of a split;
    - several of one kind, joined by ``+``: ``VOC2007:trainval+VOC2012:trainval``.

    Coordinates become zero-based: VOC's xmin and ymin count from 1 and its xmax and ymax include the last pixel, so
    the former are lowered by one, as usual. A box that reaches over the edge of its image by up to one pixel is
    clipped; by more, it is an error, as is a box that ends before it begins. A box without area (COCO has a few) is
    left out with a warning.

    Raises:
        SourceError: a file is missing or invalid, an annotation points at a missing image, a box is impossible, or
            nothing is annotated; one line that names it and says what to do.

    """
    opened = list(map(_opened, source.parts))
    kinds = {part.ignored for part in opened}
    if len(kinds) > 1:
        raise SourceError(f"{source.base_text}: parts in the layouts of VOC and COCO cannot be joined by +")
    classes = list(dict.fromkeys(name for part in opened for name in part.classes))
    # VOC has no order of classes but the alphabet; COCO's is that of its categories.
    classes = classes if opened[0].ignored == "crowd" else sorted(classes)
    joined = Annotated(source.base_text, [], [], classes, opened[0].ignored, [])
    number_of = {name: c for c, name in enumerate(classes)}
    for part in opened:
        number = torch.tensor([number_of[name] for name in part.classes], dtype=torch.int64)
        joined.files += part.files
        joined.sizes += part.sizes
        joined.origin += part.origin
        joined.objects += [objects._replace(labels=number[objects.labels]) for objects in part.objects]
    if not any(len(objects.labels) for objects in joined.objects):
        raise SourceError(f"{source.base_text}: not one object in its {len(joined)} images")
    joined.reading = source.reading
    return joined


def _opened(part: Part) -> Annotated:
    if os.path.isfile(part.path) and part.path.lower().endswith(".json"):
        return open_coco(Path(part.path), Path(part.split) if part.split else None)
    if os.path.isfile(part.path) and part.path.lower().endswith(ENDINGS):
        return open_yolo(Path(part.path), part.split)
    if os.path.isdir(part.path):
        return open_voc(Path(part.path), part.split, str(part))
    raise SourceError(
        f"{part}: there is no such folder or file: give a VOC folder and the name of a list, VOC2007:trainval, "
        "COCO's instances and their images, instances_val2017.json:val2017, or YOLO's data.yaml:train"
    )
