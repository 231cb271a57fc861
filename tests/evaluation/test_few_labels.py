"""Few labels: shares of each class, and lists of images."""

import pytest
import torch
from finetune_samples import CLASSES, drawn, draws
from hypothesis import given
from hypothesis import strategies as st

from crosslevel.evaluation.finetune import (
    Semi,
    few_labels,
    labelled_share,
    listed,
)


@given(
    seed=st.integers(0, 10_000),
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=80),
    fraction=st.floats(0, 1, exclude_min=True),
)
def test_a_share_of_the_labels_is_that_share_of_each_class(seed, labels, fraction):
    labels = torch.tensor(labels)
    index = labelled_share(labels, fraction, draws(seed))
    assert index.tolist() == sorted(set(index.tolist()))
    for c in labels.unique():
        count, all_of_them = int((labels[index] == c).sum()), int((labels == c).sum())
        assert 1 <= count <= all_of_them
        assert count == 1 or abs(count - fraction * all_of_them) <= 0.5
    assert torch.equal(labelled_share(labels, fraction, draws(seed)), index)


def test_every_image_of_a_class_may_be_drawn():
    labels = torch.arange(60) % 3
    found = torch.cat([labelled_share(labels, 0.1, draws(seed)) for seed in range(400)])
    counts = torch.bincount(found, minlength=60)  # 40 of each are expected, with a deviation of 6
    assert int(counts.min()) > 15
    assert int(counts.max()) < 65


@pytest.fixture
def named():
    source = drawn(8, 0)
    source.paths = [
        "a/00.png",
        "a/01.png",
        "a/both.png",
        "b b/00x.png",
        "b b/both.png",
        "c/d/5.png",
        "c/6.png",
        "7.png",
    ]
    source.name = "photos"
    return source


def lines(tmp_path, *text):
    file = tmp_path / "labels.txt"
    file.write_text("\n".join(text), encoding="utf-8")
    return str(file)


def test_listed_images_are_found_by_path_and_by_file_name(named, tmp_path):
    by_path = lines(tmp_path, "c/6.png", "a/both.png", "", "a/01.png", "7.png")
    assert listed(named, by_path).tolist() == [1, 2, 6, 7]
    by_name = lines(tmp_path, "6.png", "5.png", "00.png", "6.png", "c/6.png")
    assert listed(named, by_name).tolist() == [0, 5, 6]


def test_listed_names_may_have_spaces(named, tmp_path):
    """As the names of many data sets' classes have."""
    assert listed(named, lines(tmp_path, "b b/both.png", "a/00.png")).tolist() == [0, 4]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (["a/00.png", "a/99.png", "98.png"], r"2 of its 3 lines, a/99\.png first, .*photos"),
        (["a/00.png", "both.png"], r"1 of its 2 lines, both\.png first, .*photos"),
        (["", " "], "no image of photos"),
    ],
)
def test_a_list_of_missing_or_ambiguous_names_is_one_error(named, tmp_path, text, said):
    file = lines(tmp_path, *text)
    with pytest.raises(ValueError, match=said) as error:
        listed(named, file)
    assert str(error.value).startswith(f"semi.list_file={file}: ")
    assert "\n" not in str(error.value)


def test_a_list_that_is_not_there_is_one_error(named, tmp_path):
    with pytest.raises(ValueError, match=r"semi\.list_file=.*nowhere\.txt: No such file"):
        listed(named, str(tmp_path / "nowhere.txt"))


def test_few_labels_are_the_fractions_by_name(tmp_path):
    source = drawn(2000, 0)
    parts = few_labels(source, Semi(fractions=(0.005, 0.01, 0.125, 0.1, 1.0)), seed=4)
    names = ["0.5 % of labels", "1 % of labels", "12.5 % of labels", "10 % of labels", "100 % of labels"]
    assert list(parts) == names
    for part, fraction in zip(parts.values(), (0.005, 0.01, 0.125, 0.1, 1.0), strict=True):
        index = labelled_share(source.labels, fraction, draws(4)).tolist()
        assert torch.bincount(part.labels).tolist() == 4 * [round(500 * fraction)]
        assert part.paths == [source.paths[i] for i in index]
        assert torch.equal(part.data, source.data[index])
        assert part.classes == CLASSES
    (part,) = few_labels(source, Semi(list_file=lines(tmp_path, "005.png", "000.png", "002.png", "003.png")), 0).items()
    assert part[0] == "labels of labels.txt"
    assert part[1].paths == ["000.png", "002.png", "003.png", "005.png"]
    assert part[1].labels.tolist() == [0, 2, 3, 1]


def test_fewer_labels_than_classes_are_one_error(tmp_path):
    file = lines(tmp_path, "000.png", "001.png", "002.png")
    with pytest.raises(ValueError, match=r"labels\.txt: 3 labelled images for 4 classes: give more labels"):
        few_labels(drawn(8, 0), Semi(list_file=file), 0)
