"""Annotated images: what VOC's and COCO's files say, and one clear line for what is wrong in them."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from crosslevel.data.sources.annotated.open import annotated
from crosslevel.data.uri import parse
from crosslevel.utils.errors import BadImage, SourceError


def write_voc(root, images, split="trainval"):
    """A VOC folder: ``images`` maps a name to ((width, height), [(class, 1-based corners, difficult), ...])."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for key, ((width, height), objects) in images.items():
        Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(root / "JPEGImages" / f"{key}.jpg")
        items = "".join(
            f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
            + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
            + "</bndbox><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
            for name, corners, difficult in objects
        )
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{key}.jpg</filename>{size}{items}</annotation>"
        (root / "Annotations" / f"{key}.xml").write_text(text)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{key}\n" for key in images))
    return root


VOC07 = {
    "000005": ((60, 40), [("cat", (1, 1, 60, 40), 0), ("ant", (11, 6, 20.5, 25), 1)]),
    "000007": ((30, 50), [("dog", (2, 3, 2, 3), 0)]),
    "000009": ((30, 50), []),
}
VOC12 = {"2012_1": ((20, 20), [("bee", (5, 5, 15, 16), 0), ("cat", (1, 1, 21, 8), 0)])}


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path / "VOC2007", VOC07), write_voc(tmp_path / "VOC2012", VOC12)


def coco_content():
    return {
        "images": [
            {"id": 7, "file_name": "b.jpg", "width": 30, "height": 20},
            {"id": 3, "file_name": "a.jpg", "width": 40, "height": 50},
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 4, "name": "unused"}],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 1, "bbox": [2.5, 3, 10, 20.25], "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 90, "bbox": [0, 0, 30.4, 20], "iscrowd": 1},
            {"id": 5, "image_id": 3, "category_id": 90, "bbox": [0, 1, 4, 5]},
        ],
    }


@pytest.fixture
def coco(tmp_path):
    def write(content=None):
        content = content or coco_content()
        (tmp_path / "val2017").mkdir(exist_ok=True)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        for entry in coco_content()["images"]:
            picture = np.zeros((entry["height"], entry["width"], 3), np.uint8)
            Image.fromarray(picture).save(tmp_path / "val2017" / entry["file_name"])
        file = tmp_path / "annotations" / "instances_val2017.json"
        file.write_text(json.dumps(content))
        return file

    return write


def test_voc_says_what_its_files_say(voc):
    found = annotated(parse(f"{voc[0]}:trainval"))
    assert found.classes == ["ant", "cat", "dog"]
    assert len(found) == 3
    for i, key in enumerate(VOC07):
        image, objects = found[i]
        root = ElementTree.parse(voc[0] / "Annotations" / f"{key}.xml").getroot()
        assert image.shape == (3, int(root.find("size/height").text), int(root.find("size/width").text))
        expected = [[float(side.text) for side in item.find("bndbox")] for item in root.findall("object")]
        # From pixels counted from 1 to lengths: the first one begins at 0, the last one ends where it did.
        expected = np.array(expected).reshape(-1, 4) - [1, 1, 0, 0]
        assert np.array_equal(objects.boxes, expected)
        assert [found.classes[c] for c in objects.labels] == [item.find("name").text for item in root.findall("object")]
        assert objects.ignored.tolist() == [item.find("difficult").text == "1" for item in root.findall("object")]


def test_several_years_are_joined(voc):
    found = annotated(parse(f"{voc[0]}:trainval+{voc[1]}:trainval"))
    assert found.classes == ["ant", "bee", "cat", "dog"]
    assert len(found) == 4
    assert [found.classes[c] for c in found[3][1].labels] == ["bee", "cat"]
    assert [found.classes[c] for c in found[0][1].labels] == ["cat", "ant"]


def test_a_box_over_the_edge_by_a_pixel_is_clipped(voc):
    objects = annotated(parse(f"{voc[1]}:trainval"))[0][1]
    assert objects.boxes[1].tolist() == [0, 0, 20, 8]


def test_coco_says_what_its_file_says(coco):
    file = coco()
    found = annotated(parse(str(file)))
    assert found.classes == ["person", "unused", "toothbrush"]
    assert found.ignored == "crowd"
    first, second = found[0], found[1]
    assert first[0].shape == (3, 20, 30)
    assert first[1].boxes.tolist() == [[0, 0, 30, 20]]
    assert first[1].ignored.tolist() == [True]
    assert second[1].boxes.tolist() == [[2.5, 3, 12.5, 23.25], [0, 1, 4, 6]]
    assert second[1].labels.tolist() == [0, 2]
    assert second[1].ignored.tolist() == [False, False]
    elsewhere = file.parent.parent / "elsewhere"
    (file.parent.parent / "val2017").rename(elsewhere)
    assert annotated(parse(f"{file}:{elsewhere}")).files == [str(elsewhere / "b.jpg"), str(elsewhere / "a.jpg")]


def test_ignored_objects_are_no_examples(voc, coco):
    train = annotated(parse(f"{voc[0]}:trainval"))
    assert train.names() == {"cat", "dog"}
    assert train[0][1].usable.labels.tolist() == [1]
    assert len(train.with_examples()) == 2
    assert annotated(parse(str(coco()))).with_examples().files[0].endswith("a.jpg")


def test_the_test_set_gets_the_numbers_of_the_training_set(voc, tmp_path):
    train = annotated(parse(f"{voc[0]}:trainval+{voc[1]}:trainval"))
    other = {"t": ((30, 30), [("dog", (1, 1, 9, 9), 0), ("cat", (1, 1, 8, 8), 0), ("yak", (3, 3, 9, 9), 1)])}
    test = annotated(parse(f"{write_voc(tmp_path / 'test', other)}:trainval")).numbered_as(train)
    assert test.classes == train.classes
    # Only a difficult object has a class that training lacks: there is nothing to find.
    assert [train.classes[c] for c in test[0][1].labels] == ["dog", "cat"]


def test_a_box_without_area_is_left_out_and_named(coco):
    content = coco_content()
    content["annotations"][0]["bbox"][2] = 0
    with pytest.warns(UserWarning, match=r"annotation 1: box \(2.5, 3, 2.5, 23.25\) has no area"):
        found = annotated(parse(str(coco(content))))
    assert found[1][1].labels.tolist() == [2]


def test_an_image_of_another_size_than_its_annotation_says_is_bad(voc):
    file = voc[1] / "JPEGImages" / "2012_1.jpg"
    Image.new("RGB", (25, 20)).save(file)
    with pytest.raises(BadImage, match="says 20x20 pixels, the image has 25x20"):
        annotated(parse(f"{voc[1]}:trainval"))[0]


def test_an_annotation_without_size_takes_the_image_s(voc):
    file = voc[1] / "Annotations" / "2012_1.xml"
    file.write_text(file.read_text().replace("<width>20</width>", "<width>0</width>"))
    assert annotated(parse(f"{voc[1]}:trainval")).sizes == [(20, 20)]


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


VOC_FAULTS = {
    "image": (lambda root: (root / "JPEGImages" / "000005.jpg").unlink(), "000005.jpg is missing"),
    "name": (lambda r: edit(r / "Annotations/000005.xml", "000005.jpg", "lost.jpg"), "lost.jpg is missing"),
    "annotation": (lambda r: (r / "Annotations/000007.xml").unlink(), "trainval.txt names 000007"),
    "broken": (lambda r: (r / "Annotations/000007.xml").write_text("<annotation>"), "000007.xml: not an annotation"),
    "empty list": (lambda r: (r / "ImageSets/Main/trainval.txt").write_text("\n"), "an empty list"),
    "no list": (lambda r: (r / "ImageSets/Main/trainval.txt").rename(r / "ImageSets/Main/val.txt"), "there are: val"),
    "no objects": (lambda r: (r / "ImageSets/Main/trainval.txt").write_text("000009\n"), "not one object"),
    "outside": (lambda r: edit(r / "Annotations/000005.xml", "<xmax>60<", "<xmax>62<"), "object 1: box (0, 0, 62, 40)"),
    "swapped": (lambda r: edit(r / "Annotations/000007.xml", "<xmax>2<", "<xmax>0<"), "ends before it begins"),
    "no number": (lambda r: edit(r / "Annotations/000005.xml", "<xmin>1<", "<xmin>one<"), "<bndbox>"),
    "not a number": (lambda r: edit(r / "Annotations/000005.xml", "<xmin>1<", "<xmin>nan<"), "ends before"),
    "no class": (lambda r: edit(r / "Annotations/000005.xml", "<name>cat</name>", ""), "without <name>"),
    "no images": (lambda r: (r / "JPEGImages").rename(r / "Images"), "JPEGImages: No such file"),
}


@pytest.mark.parametrize("fault", VOC_FAULTS)
def test_faults_in_voc_end_in_one_line(voc, fault):
    spoil, named = VOC_FAULTS[fault]
    spoil(voc[0])
    with pytest.raises(SourceError) as caught:
        annotated(parse(f"{voc[0]}:trainval"))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


COCO_FAULTS = {
    "image": ({"images": [{"id": 1, "file_name": "lost.jpg", "width": 4, "height": 4}], "annotations": []}, "lost.jpg"),
    "no images": ({"images": []}, "an empty set"),
    "unlisted image": (
        {"annotations": [{"id": 8, "image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1]}]},
        "annotation 8 points at image 99",
    ),
    "unlisted class": (
        {"annotations": [{"id": 8, "image_id": 3, "category_id": 2, "bbox": [0, 0, 1, 1]}]},
        "annotation 8 points at category 2",
    ),
    "outside": (
        {"annotations": [{"id": 8, "image_id": 3, "category_id": 1, "bbox": [30, 0, 12, 9]}]},
        "annotation 8: box (30, 0, 42, 9) lies outside its image of 40x50 pixels",
    ),
    "three numbers": ({"annotations": [{"id": 8, "image_id": 3, "category_id": 1, "bbox": [1, 2, 3]}]}, "lacks"),
    "no box": ({"annotations": [{"id": 8, "image_id": 3, "category_id": 1}]}, "'bbox'"),
    "no objects": ({"annotations": []}, "not one object"),
    "no categories": ({"categories": None}, "no list of categories"),
}


@pytest.mark.parametrize("fault", COCO_FAULTS)
def test_faults_in_coco_end_in_one_line(coco, fault):
    change, named = COCO_FAULTS[fault]
    with pytest.raises(SourceError) as caught:
        annotated(parse(str(coco({**coco_content(), **change}))))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_wrong_uses_end_in_one_line(voc, coco, tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    wrong = {
        str(tmp_path / "nowhere"): "no such folder",
        str(voc[0]): "there are: trainval",
        f"{voc[0]}:test": "test.txt",
        f"{voc[0]}:trainval+{coco()}": "cannot be joined",
        str(tmp_path / "list.json"): "no list of images",
    }
    for source, named in wrong.items():
        with pytest.raises(SourceError) as caught:
            annotated(parse(source))
        assert named in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_class_that_training_lacks_is_named(voc):
    first, second = (annotated(parse(f"{root}:trainval")) for root in voc)
    with pytest.raises(SourceError, match=r"VOC2012:trainval has classes that .*VOC2007:trainval lacks: bee"):
        second.numbered_as(first)
    only_ignored = first.numbered_as(first)
    only_ignored.objects = [o._replace(ignored=torch.ones_like(o.ignored)) for o in first.objects]
    with pytest.raises(SourceError, match="not one of its 3 images"):
        only_ignored.with_examples()
