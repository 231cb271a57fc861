"""Figures of a collection, on images whose truth is known."""

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.duplicates.scan import scan
from crosslevel.data.duplicates.sets import duplicate_sets
from crosslevel.data.images import InMemoryImages
from crosslevel.data.sources.turntable.dataset import Turntable
from crosslevel.inspection.scan import structure
from crosslevel.inspection.summary import summary


class Unlabelled(InMemoryImages):
    """Asking for the truth fails."""

    def __init__(self, data):
        self.data, self.paths, self.name = data, [f"{i}.png" for i in range(len(data))], "unlabelled"

    def __getattribute__(self, name):
        assert name not in ("labels", "classes", "tracks")
        return super().__getattribute__(name)

    def __getitem__(self, i):
        return self.data[i], -1


def figures_of(data, batch_size):
    bad_files, source = BadFiles(), Unlabelled(data)
    scanned = scan(source, bad_files, 0)
    common = structure(scanned)
    members = duplicate_sets(scanned, common.pairs, source.paths)
    return summary("made", len(data), source, scanned, common, members, bad_files, batch_size, None)


def test_estimated_shares_of_duplicates_rank_the_true_ones_without_any_label():
    shares = []
    for frames, objects in ((1, 40), (3, 24), (12, 12)):
        made = Turntable(classes=4, objects=objects, frames=frames, imbalance=2, size=32, seed=frames)
        shares.append(figures_of(made.data, 32)["batch"]["duplicate_share"])
    assert shares == sorted(shares)
    assert shares[0] < 0.05 < 0.5 < shares[2]
