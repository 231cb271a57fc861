"""The instance branch and the group branch of a run: their heads, what they share, what is kept of them."""

import pytest
import torch
import yaml
from run_samples import losses
from torch.nn.modules.module import register_module_forward_pre_hook
from train_samples import FAST, same_weights

from crosslevel import CrossLevel, load_encoder
from crosslevel.evaluation.evaluate import evaluate
from crosslevel.methods import BYOL, NPID, MoCo, SimCLR
from crosslevel.models.encoder import Encoder
from crosslevel.models.sync_batchnorm import SyncBatchNormAct
from crosslevel.runs import load_branches, load_cld
from crosslevel.settings.parser import run
from crosslevel.training.loop.module import remembered, share_hidden
from crosslevel.training.train import train


def test_the_cld_branch_and_both_heads_are_trained(photos, tmp_path):
    torch.manual_seed(0)
    run(train, [str(photos), *FAST, "--epochs=1", f"--run={tmp_path}/r", "--optimizer=lars"])
    state = torch.load(tmp_path / "r" / "checkpoints" / "last.ckpt", weights_only=False)
    trained = {k for k in state["state_dict"] if k.startswith(("encoder.", "method.branch", "cld.branch"))}
    moments = state["optimizer_states"][0]["state"]
    parameters = [k for k in trained if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(moments) == len(parameters)


@pytest.mark.parametrize("head", ["linear", "mlp", "norm-linear", "norm-mlp"])
def test_both_branches_are_read_back_whatever_their_heads(photos, tmp_path, head):
    heads = [f"--method.head={head}", f"--cld.head={head}"]
    run(train, [str(photos), *FAST, "--epochs=1", f"--run={tmp_path}/r", *heads])
    assert load_cld(tmp_path / "r").head == head
    state = torch.load(tmp_path / "r" / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    found = load_branches(tmp_path / "r")
    for name, prefix in (("instance branch", "method.branch."), ("group branch", "cld.branch.")):
        kept = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        assert kept.keys() == found[name].state_dict().keys()
        for key, value in found[name].state_dict().items():
            torch.testing.assert_close(value, kept[key])


def test_branches_are_judged_by_the_figures_that_recipes_name(photos, tmp_path):
    run(train, [str(photos), *FAST, "--epochs=1", f"--run={tmp_path}/r"])
    fixed = ["--device=cpu", "--precision=fp32", "--branches=true", "--protocol=knn"]
    rows = run(evaluate, [f"{tmp_path}/r", str(photos), f"--test={photos}", *fixed]).popitem()[1]
    assert list(rows)[-3:] == ["trained encoder", "instance branch", "group branch"]


def test_the_settings_keep_the_number_of_views_that_was_given(photos, tmp_path):
    run(train, [str(photos), *FAST, "--method=MoCo", "--epochs=1", f"--run={tmp_path}/r"])
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["method"]["init_args"]["online"] == 1


def test_a_network_for_one_size_gets_views_of_that_size(photos, tmp_path, capsys):
    options = ["--batch_size=8", "--log_every=1", "--device=cpu", "--report_html=false", "--epochs=1"]
    name = ["--encoder.name=test_vit", "--encoder.image_size=48"]
    run(train, [str(photos), *options, *name, f"--run={tmp_path}/r"])
    assert load_encoder(tmp_path / "r").view.size == 48
    with pytest.raises(SystemExit):
        run(train, [str(photos), *options, *name, "--views.size=32", f"--run={tmp_path}/s"])
    assert "views.size=32 does not suit test_vit" in capsys.readouterr().err


def test_a_network_for_one_size_takes_small_crops_in_whole_patches(photos, tmp_path, capsys):
    options = [str(photos), "--batch_size=12", "--log_every=1", "--device=cpu", "--report_html=false", "--epochs=1"]
    options += ["--encoder.name=test_vit", "--encoder.image_size=80", "--method=dino", "--method.outputs=12"]
    with pytest.raises(SystemExit) as stop:
        run(train, [*options, "--views.small_size=20", f"--run={tmp_path}/r"])
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1)
    assert "views.small_size=20: test_vit needs a multiple of its patches' 16 pixels" in said
    run(train, [*options, f"--run={tmp_path}/r"])
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["views"]["small_size"] == 32
    assert "2 views of 80 pixels and 8 of 32" in capsys.readouterr().out
    assert len(losses(tmp_path / "r")) == 2
    assert load_encoder(tmp_path / "r").fixed_size == 80


def test_a_jigsaw_needs_a_network_for_patches(photos, tmp_path, capsys):
    options = ["--batch_size=4", "--log_every=1", "--device=cpu", "--report_html=false", "--epochs=1"]
    options += ["--encoder.name=test_vit", "--encoder.image_size=48", "--method=infomin"]
    with pytest.raises(SystemExit) as stop:
        run(train, [str(photos), *options, f"--run={tmp_path}/r"])
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1)
    assert "InfoMin's patches are 14 pixels, test_vit is built for 48: give --method.jigsaw 0 or a conv" in said
    assert not (tmp_path / "r").exists()
    run(train, [str(photos), *options, "--method.jigsaw=0", f"--run={tmp_path}/r"])
    assert len(losses(tmp_path / "r")) == 6


def test_synchronized_statistics_keep_activations_through_a_run(photos, tmp_path):
    """On one device nothing but the layers' class changes: the same losses and weights."""
    calls = {"true": 0, "false": 0}
    for sync in calls:

        def counted(module, given, sync=sync):
            calls[sync] += isinstance(module, SyncBatchNormAct)

        options = [
            "--encoder.name=test_efficientnet",
            "--views.size=64",
            "--precision=fp32",
            f"--sync_batchnorm={sync}",
        ]
        hook = register_module_forward_pre_hook(counted)
        try:
            run(train, [str(photos), *FAST[2:], *options, "--epochs=1", f"--run={tmp_path}/{sync}"])
        finally:
            hook.remove()
    assert calls["true"] > 0 == calls["false"]
    assert losses(tmp_path / "true") == losses(tmp_path / "false")
    assert same_weights(tmp_path / "true", tmp_path / "false")


def test_both_heads_may_share_their_hidden_layer(photos, tmp_path):
    """One layer, trained by both branches; the last layers are each branch's own."""
    heads = ["--method=MoCo", "--method.head=norm-mlp", "--cld.head=norm-mlp", "--share_hidden=true"]
    run(train, [str(photos), *FAST, "--epochs=1", *heads, f"--run={tmp_path}/r"])
    state = torch.load(tmp_path / "r" / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    assert torch.equal(state["cld.branch.0.weight"], state["method.branch.0.weight"])
    assert not torch.equal(state["cld.branch.2.weight"], state["method.branch.2.weight"])
    torch.testing.assert_close(load_cld(tmp_path / "r").branch[0].weight, state["cld.branch.0.weight"])


def test_a_shared_layer_has_the_gradient_of_both_branches():
    encoder = torch.nn.Identity()
    encoder.num_features = 6
    method = SimCLR(encoder, head="mlp", out_features=4, hidden=6, batch_norm=False)
    cld = CrossLevel(6, groups=3, head="norm-mlp", out_features=4)
    share_hidden(method, cld)
    h = [torch.randn(8, 6) for _ in range(2)]
    slopes = []
    for branches in ((1, 0), (0, 1), (1, 1)):
        method.zero_grad()
        (branches[0] * method([], h, torch.arange(8))[0] + branches[1] * cld(*h)).backward()
        slopes.append(method.branch[0].weight.grad.clone())
    assert min(slope.abs().max() for slope in slopes[:2]) > 1e-5
    torch.testing.assert_close(slopes[0] + slopes[1], slopes[2])
    assert len({id(p) for p in (*method.parameters(), *cld.parameters())}) == 2 + 2 + 1


def test_npid_saves_its_bank_with_the_run(photos, tmp_path):
    """In float16, with sampled negatives."""
    options = ["--method=NPID", "--method.negatives=7", "--method.float16=true", "--epochs=1"]
    run(train, [str(photos), *FAST, *options, f"--run={tmp_path}/r"])
    state = torch.load(tmp_path / "r" / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    rows = state["method.bank.rows"]
    assert (rows.dtype, tuple(rows.shape)) == (torch.float16, (24, 128))


def test_the_memories_are_not_sent_between_devices():
    """Nothing that grows with images or queue is broadcast in each step; batch statistics are."""
    encoder = Encoder("resnet18", width=0.0625)
    for method, names in (
        (MoCo(encoder), {"method.negatives.keys", "method.negatives.position"}),
        (NPID(encoder, 30, negatives=4, sharded=True), {"method.bank.bank.rows"}),
        (BYOL(encoder), set()),
    ):
        assert set(remembered(method, "method")) == names
