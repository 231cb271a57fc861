"""The claims of the paper's abstract, each as trainings to compare; `claims.py` runs them."""

from __future__ import annotations

from typing import NamedTuple

NOT_IN_PAPER = "not in the paper"
BASELINES = ("raw pixels", "untrained encoder", "random initialization", "supervised encoder")
OFF = "--cld.weight=0"
CLD = "--cld.weight=0.25"


class Claim(NamedTuple):
    """What the abstract ``says``, the ``arms``' options by name (the first is compared with), and by which ``figure``.

    ``rule``: whether arms are compared by their mean (difference), by their deviation over seeds (spread), or by
    whether they train at all (trains).
    """

    says: str
    arms: dict[str, str]
    source: str = "balanced"
    figure: str = "knn"
    rule: str = "difference"


def on_and_off(method: str, more: str = "") -> dict[str, str]:
    """A method alone, and with CLD; both with two views that the trained network encodes."""
    online = " --method.online=2" if method in ("NPID", "MoCo", "InfoMin") else ""
    line = f"--method={method}{online}{more}"
    return {"alone": f"{line} {OFF}", "with CLD": f"{line} {CLD}"}


MOCO, NPID = (on_and_off(method)["with CLD"] for method in ("MoCo", "NPID"))
MOCO_IN_ORDER = on_and_off("MoCo", " --order=natural")["with CLD"]
MOCO_ALONE = MOCO.removesuffix(f" {CLD}")


def varied(option: str, default: str, values: list[str]) -> dict[str, str]:
    """MoCo with CLD, which several claims share, and one option at other values."""
    return {default: MOCO} | {value: f"{MOCO} {option}={value}" for value in values}


def key_of(source: str, line: str, seed: int) -> str:
    """A training's name in the record: claims that need the same training share it."""
    return f"{source} | {line} | {seed}"


RATES = {
    f"{name}, rate {rate}": f"{line} --lr={rate}" for rate in ("0.06", "0.5", "2", "8")
    for name, line in on_and_off("NPID").items()
}  # fmt: skip
CLAIMS = {
    "npid": Claim("an add-on that improves NPID", on_and_off("NPID")),
    "moco": Claim("an add-on that improves MoCo", on_and_off("MoCo")),
    "infomin": Claim("an add-on that improves InfoMin", on_and_off("InfoMin", " --views.preset=infomin")),
    "byol": Claim("an add-on that improves BYOL", on_and_off("BYOL")),
    "simclr": Claim("an add-on to SimCLR (not in the paper)", on_and_off("SimCLR")),
    "simclr-schedule": Claim(
        "an add-on to SimCLR with a temperature schedule (not in the paper)",
        on_and_off("SimCLR", " --method.temperature=0.1 --method.temperature_max=1"), "long-tailed",
    ),
    "vicreg": Claim("an add-on to VICReg (not in the paper)", on_and_off("VICReg")),
    "simsiam": Claim("an add-on to SimSiam (not in the paper)", on_and_off("SimSiam")),
    "swav": Claim("an add-on to SwAV (not in the paper)", on_and_off("SwAV", " --views.preset=swav")),
    "swav-prior": Claim(
        "an add-on to SwAV whose prototypes' shares follow a power law (not in the paper)",
        on_and_off("SwAV", " --views.preset=swav --method.prior=0.25"), "long-tailed",
    ),
    "dino": Claim("an add-on to DINO (not in the paper)", on_and_off("DINO", " --views.preset=dino")),
    "harmonization": Claim(
        "an add-on beside geometric harmonization (not in the paper)",
        on_and_off("SimCLR", " --gh.weight=1"),
        "long-tailed",
    ),
    "simclr-tail": Claim("an add-on to SimCLR on a long tail (not in the paper)", on_and_off("SimCLR"), "long-tailed"),
    "swav-tail": Claim(
        "an add-on to SwAV on a long tail (not in the paper)",
        on_and_off("SwAV", " --views.preset=swav"),
        "long-tailed",
    ),
    "long-tail": Claim("better on long-tailed collections", on_and_off("MoCo"), "long-tailed"),
    "correlated": Claim("better on highly correlated collections", on_and_off("MoCo"), "correlated"),
    "balanced": Claim("better on balanced collections", on_and_off("MoCo")),
    "stable-seeds": Claim("more stable: less spread over seeds", on_and_off("NPID"), rule="spread"),
    "stable-rate": Claim("more stable: trains at higher rates", RATES, rule="trains"),
    "stable-order": Claim("more stable: in natural order", on_and_off("MoCo", " --order=natural"), "correlated"),
    "ratio": Claim("a better ratio of positives to negatives", on_and_off("MoCo"), figure="contrast"),
    "invariance": Claim("features that agree more between views", on_and_off("MoCo"), figure="agreement"),
    "derived": Claim(
        "group features derived separately from instance features",
        {"own": f"{MOCO} --method.head=linear --cld.head=linear"}
        | {on: f"{MOCO} --cld.on={on} --method.head=linear --cld.head=linear" for on in ("instance", "shared")},
    ),
    "heads": Claim(
        "normalized projection heads",
        {head: f"{MOCO} --method.head={head} --cld.head={head}"
         for head in ("linear", "norm-linear", "mlp", "norm-mlp")},
    ),
    "groups": Claim("how many groups", varied("--cld.groups", "96", ["10", "32", "64", "128"])),
    "temperature": Claim("the temperature of groups", varied("--cld.temperature", "0.2", ["0.07", "0.4", "0.8"])),
    "weight": Claim("the weight of the group branch", varied("--cld.weight", "0.25", ["0.1", "0.5", "1", "2"])),
    "centroids": Claim("plain or normalized centroids", varied("--cld.normalize_centroids", "true", ["false"])),
    "grouping": Claim("k-means or normalized cut", varied("--cld.grouping", "kmeans", ["normalized-cut"])),
    "few-centroids": Claim(
        "plain or normalized centroids of few groups (10 of 128, weight 2, T 0.07, as published users set them)",
        {
            "normalized": f"{MOCO_ALONE} --cld.weight=2 --cld.groups=10 --cld.temperature=0.07",
            "plain": f"{MOCO_ALONE} --cld.weight=2 --cld.groups=10 --cld.temperature=0.07 "
            "--cld.normalize_centroids=false",
        },
    ),
    "per-view": Claim(
        "NPID's bank moves once by the views' mean, or once for each view",
        {"mean": NPID, "each view": f"{NPID} --method.per_view=true"},
    ),
    "tracks": Claim(
        "frames of one track as positives, in shuffled order (not in the paper)",
        {"without": MOCO, "half": f"{MOCO} --track_positives=0.5"}, "correlated",
    ),
    "tracks-order": Claim(
        "frames of one track as positives, in natural order (not in the paper)",
        {"without": MOCO_IN_ORDER, "half": f"{MOCO_IN_ORDER} --track_positives=0.5"}, "correlated",
    ),
    "few-init": Claim(
        "how k-means begins with few groups in natural order (not in the paper)",
        {init: f"{MOCO_IN_ORDER} --cld.groups=16 --cld.init={init}" for init in ("first", "random")},
        "correlated",
    ),
    "init": Claim("how k-means begins", varied("--cld.init", "first", ["random", "kmeans++"])),
    "semi-1": Claim("semi-supervised, 1 % of the labels", on_and_off("MoCo"), figure="semi 1"),
    "semi-10": Claim("semi-supervised, 10 % of the labels", on_and_off("MoCo"), figure="semi 10"),
    "transfer-clothing": Claim("transfer to clothing", on_and_off("MoCo"), figure="linear clothing"),
    "transfer-turntable": Claim("transfer to turntable", on_and_off("MoCo"), figure="linear turntable"),
    "detection": Claim("object detection with few labels", on_and_off("MoCo"), figure="detection"),
}  # fmt: skip
FIGURES = {
    "knn": "kNN accuracy of the shared features, %",
    "contrast": "exp(cosine / 0.2) of an image's two views over its mean with other images' (instance features)",
    "agreement": "images whose nearest other view is their own, % of 1,000 (instance features)",
    "semi 1": "fine-tuned with 1 % of the labels, %",
    "semi 10": "fine-tuned with 10 % of the labels, %",
    "linear clothing": "linear classifier on frozen features of photographs of clothing, %",
    "linear turntable": "linear classifier on frozen features of the turntable, %",
    "detection": "AP50 of a detector fine-tuned on 150 scenes that CIFAR-10's photographs are pasted in, %",
}
