"""Every recipe: its head, its settings, and one step of it at reduced size."""

import functools
import re

import pytest
import torch
import yaml
from run_samples import losses, write_images

from crosslevel import CrossLevel
from crosslevel.cli import main
from crosslevel.settings import recipes
from crosslevel.settings.parser import run
from crosslevel.training.train import train

EVERY = recipes.every()
NAMES = [recipe.name for recipe in EVERY]

REDUCED = {
    "MoCo": ["--method.queue=16"],
    "InfoMin": ["--method.queue=16"],
    "NPID": ["--method.negatives=5"],
    "BYOL": ["--method.hidden=16"],
    "SimSiam": ["--method.out_features=16"],
}


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("eight"), count=8, size=(32, 32), classes=("",))


def tree(name):
    return yaml.safe_load(recipes.find(name).file.read_text())


def leaves(node, place=""):
    """Every value of a tree and where it stands."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", value


def kind(told):
    """What decides which code a recipe runs: of those that differ in numbers alone, one takes a step."""
    keys = tuple(sorted(place for place, _ in leaves(told) if place != "images"))
    words = tuple(
        sorted((place, value) for place, value in leaves(told) if isinstance(value, str) and place != "images")
    )
    return keys, words, bool(told["cld"]["weight"])


ONE_OF_EACH = list({kind(tree(name)): name for name in NAMES}.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_keeps_its_settings(name, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "photos", "--recipe", name, "--print_config"])
    assert end.value.code == 0
    told, done = tree(name), dict(leaves(yaml.safe_load(capsys.readouterr().out)))
    method = told["method"].pop("class_path").rsplit(".", 1)[1]
    assert done["method.class_path"].endswith(f".{method}")
    for place, value in leaves(told):
        if place != "images":
            assert done[place] == value, place


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_recipe_takes_a_step(eight, tmp_path, name):
    told = tree(name)
    method = told["method"]["class_path"].rsplit(".", 1)[1]
    small = ["--epochs=1", "--warmup_epochs=0", "--batch_size=8", "--views.size=32", "--encoder.name=resnet18"]
    small += ["--encoder.width=0.0625", "--device=cpu", "--log_every=1", "--report_html=false", "--run", str(tmp_path)]
    small += REDUCED[method] if told["method"]["init_args"].get("negatives", 1) else []
    if told["cld"]["weight"]:
        small += ["--cld.groups=4"]
    if "splits" in told["method"]["init_args"]:
        small += ["--method.splits=2"]
    if told.get("share_hidden"):
        small += ["--method.hidden=32", "--cld.hidden=32"]
    run(train, [str(eight), "--recipe", name, *small])
    assert len(losses(tmp_path)) == 1
    done = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert done["method"]["class_path"].endswith(f".{method}")
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    assert any(key.startswith("cld.") for key in state) == bool(told["cld"]["weight"])


@pytest.mark.parametrize("recipe", EVERY, ids=NAMES)
def test_the_head_says_what_it_is_and_what_it_is_meant_to_reach(recipe):
    assert recipe.title.count(" on ") == 1
    assert recipe.settings
    assert re.match(r"\d\d\.\d % \(.+\)$|no figure recorded", recipe.published)
    assert ("+ CLD" in recipe.title) == ("-cld" in recipe.name) == bool(tree(recipe.name)["cld"]["weight"])


@pytest.mark.parametrize("name", [name for name in NAMES if "-cld" in name])
def test_every_recipe_with_cld_has_one_without(name):
    """It differs in nothing but the group branch and the second query view that this one needs."""
    with_cld, without = tree(name), tree(name.replace("-cld", ""))
    assert with_cld.pop("cld")["weight"] > 0
    assert without.pop("cld") == {"weight": 0.0}
    with_cld.pop("share_hidden", None)
    online = [told["method"]["init_args"].pop("online", None) for told in (with_cld, without)]
    assert online == ([None, None] if "byol" in name or "simsiam" in name else [2, 1])
    assert with_cld == without


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("imagenet") and "-cld" in name])
def test_every_image_of_a_device_is_its_own_group(name):
    """As in the authors' runs, which asked for 120 groups of 64 images; on one device, and on eight as it says."""
    told = tree(name)
    batch, file = told["batch_size"], recipes.find(name).file.read_text()
    each, groups = map(int, re.search(r"--devices 8 --batch_size (\d+) --cld.groups (\d+)", file).groups())
    assert 8 * each == batch
    assert ("byol" in name or "npid" in name) or each == 64
    for count, k in ((batch, told["cld"]["groups"]), (each, groups)):
        assert alone(count, tuple({**told["cld"], "hidden": None, "groups": k}.items()))


@functools.cache
def alone(count, settings):
    """Whether each of so many images is its own group, and of its own device."""
    cld = CrossLevel(16, **dict(settings))
    cld(*torch.randn(2, count, 16, generator=torch.Generator().manual_seed(0)))
    return not cld.gather and torch.equal(cld.last.a.sizes, torch.ones(count))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("imagenet")])
def test_the_command_for_eight_devices_keeps_batch_statistics_as_they_are(name):
    """Where keys are normalized in parts on one device, as on eight, there must be no parts on each of eight."""
    parts = tree(name)["method"]["init_args"].get("splits", 1)
    line = re.search(r"--devices 8 --batch_size .*", recipes.find(name).file.read_text()).group()
    assert ("--method.splits 1" in line) == (parts > 1)
    assert parts in (1, 8)


def test_settings_of_the_authors_code():
    """What their networks, losses and schedules are, where a recipe says that it is theirs."""
    for name, told in ((name, tree(name)) for name in NAMES):
        small = name.startswith(("cifar", "stl10"))
        if small:
            assert told["encoder"] == {"name": "resnet18", "small_images": True, "zero_init_last": False}, name
        if small and "-cld" in name:
            assert told["cld"]["normalize_centroids"] is False, name
        if name.startswith("stl10"):
            views = {k: told["views"].get(k) for k in ("size", "jitter", "hue", "blur", "erase")}
            assert views == {"size": 96, "jitter": 1.0, "hue": 0.4, "blur": None, "erase": None}, name
        if "infomin" in name:
            assert told["warmup_epochs"] == 5, name
        if "the authors' ImageNet recipe" in recipes.find(name).settings:
            assert told["encoder"]["zero_init_last"] is False, name


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("imagenet") and "byol" in name])
def test_byol_has_one_preset_of_its_authors(name):
    """Their code's for 300 epochs: lr 0.3 at 256 images, decay 1e-6, momentum 0.99."""
    told = tree(name)
    assert told["lr"] == pytest.approx(0.3 * told["batch_size"] / 256)
    assert (told["weight_decay"], told["method"]["init_args"]["momentum"]) == (1e-6, 0.99)


PUBLISHED = {
    "cifar10-npid": 80.8, "cifar10-npid-cld": 86.7, "cifar10-moco": 82.1, "cifar10-moco-cld": 87.5,
    "cifar100-npid": 51.6, "cifar100-npid-cld": 57.5, "cifar100-moco": 53.1, "cifar100-moco-cld": 58.1,
    "cifar100-moco-cld-normlinear": 59.7, "imagenet-mocov2": 67.5, "imagenet-mocov2-cld": 69.2,
    "imagenet-mocov2-cld-normmlp": 70.0, "imagenet-infomin": 67.4, "imagenet-infomin-cld": 69.5,
    "imagenet-infomin-200": 70.1,
    "imagenet-infomin-cld-normmlp": 70.1, "imagenet-infomin-cld-200": 70.6, "imagenet-infomin-cld-normmlp-200": 71.5,
}  # fmt: skip


def test_every_method_is_there_for_every_data_set_with_cld_and_without():
    few = {"cifar10lt": ["npid", "moco"], "cifar100lt": ["npid", "moco"], "kitchen": ["npid", "moco"]}
    few |= {"imagenetlt": ["mocov2"], "films": ["byol", "simsiam"]}
    wanted = {f"{place}-{method}{end}" for place, methods in few.items() for method in methods for end in ("", "-cld")}
    assert wanted | {"cifar10-moco-earlier", "cifar10-moco-cld-earlier"} <= set(NAMES)
    sets = {"cifar10": "moco", "cifar100": "moco", "stl10": "moco", "imagenet100": "mocov2", "imagenet": "mocov2"}
    for place, moco in sets.items():
        methods = ["npid", moco, "byol", *(["infomin"] if "imagenet" in place else [])]
        wanted = {f"{place}-{method}{end}" for method in methods for end in ("", "-cld")}
        assert wanted <= set(NAMES)


def test_a_recipe_of_official_files_needs_no_folder():
    own = {name: tree(name).get("images") for name in NAMES}
    for name, images in own.items():
        place = name.partition("-")[0]
        official = place.removesuffix("lt") + ("@imbalance=100" if place.endswith("lt") else "")
        assert images == {"stl10": "stl10:train+unlabeled"}.get(place, official if "cifar" in place else None)


def test_every_published_row_has_its_recipe():
    shown = {r.name: float(r.published[:4]) for r in EVERY if r.published[0].isdigit()}
    assert {name: shown.get(name) for name in PUBLISHED} == PUBLISHED


def test_the_list_shows_names_and_figures(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["recipes"])
    said = capsys.readouterr().out
    assert all(name in said for name in NAMES)
    assert "86.7 %" in said
    with_figure = sum(recipe.published[0].isdigit() for recipe in EVERY)
    assert f"{with_figure} of {len(EVERY)} recipes have a published figure" in said
    main(["recipes", "--show", "cifar10-npid"])
    assert capsys.readouterr().out == recipes.find("cifar10-npid").file.read_text()


def test_an_unknown_recipe_names_the_nearest(eight, capsys):
    with pytest.raises(SystemExit) as stop:
        run(train, [str(eight), "--recipe=cifar10-mocco-cld"])
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1)
    assert "did you mean cifar10-moco-cld?" in said
