"""What the group branch's features are derived from: published, and the two ablations."""

import pytest
import torch
import torch.nn.functional as F
from run_samples import write_images

from crosslevel.cld.loss import CrossLevel
from crosslevel.runs import load_branches, load_cld
from crosslevel.settings.parser import run
from crosslevel.training.train import train


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("eight"), count=8, size=(16, 16), classes=("",))


@pytest.mark.parametrize("on", ["own", "instance", "shared"])
def test_the_group_branch_stands_on_what_was_asked_for(eight, tmp_path, on):
    """As it is kept with the run and loaded again, and as it was when the losses were computed."""
    small = ["--epochs=2", "--warmup_epochs=0", "--batch_size=8", "--encoder.width=0.0625", "--device=cpu", "--lr=0.3"]
    small += ["--method=NPID", "--cld.groups=4", "--report_html=false", "--precision=fp32", f"--cld.on={on}"]
    run(train, [str(eight), *small, "--method.out_features=12", "--cld.out_features=10", "--run", str(tmp_path)])
    heads, cld = load_branches(tmp_path), load_cld(tmp_path)
    instance, group = heads["instance branch"], heads["group branch"]
    h = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    expected = {
        "own": lambda: cld.branch[0](h),
        "instance": lambda: cld.branch[-1](F.normalize(instance(h), dim=1)),
        "shared": lambda: instance(h),
    }[on]
    assert cld.on == on
    assert group(h).shape == (5, 12 if on == "shared" else 10)
    torch.testing.assert_close(group(h), expected())
    first = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(first["cld.branch.0.weight"], first["method.branch.0.weight"]) == (on != "own")


def test_an_unknown_place_is_named():
    with pytest.raises(ValueError, match="on='both' is not one of own, instance, shared"):
        CrossLevel(8, on="both")


def test_a_head_with_batch_statistics_is_not_shared(eight, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(train, [str(eight), "--method=SimCLR", "--cld.on=shared", "--run", str(tmp_path), "--epochs=1"])
    assert "the head of SimCLR normalizes its batch" in capsys.readouterr().err
