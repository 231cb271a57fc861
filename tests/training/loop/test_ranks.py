"""The same losses from 1, 2 and 4 processes with the same batches of all, with encoders whole and in parts.

All cases share one start of the processes, which find each other as those of torchrun do.
"""

import os
import pickle
import re
import shutil
import warnings

import numpy as np
import pytest
import rank_samples
import torch
from container_samples import write_tar
from forks import ended
from picture_samples import encoded
from PIL import Image
from rank_samples import CASES, LAYOUTS, SHARDED, STEPS, VIT, logged, name_of, step_of, torchrun, total

from crosslevel.methods import METHODS
from crosslevel.runs import Run, claimed, restarted
from crosslevel.training.loop import checkpoints
from crosslevel.training.loop.fabric import check_memory, check_step
from crosslevel.training.loop.sharding import check_strategy
from crosslevel.utils.errors import MachineError, UserError
from crosslevel.utils.processes import is_first, world

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The losses of all cases on 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("ranks")
    draws = np.random.default_rng(0)
    for i in range(2):
        pictures = draws.integers(0, 256, (30, 20, 20, 3), np.uint8)
        members = [(f"{n:03}.png", encoded(Image.fromarray(picture), "PNG")) for n, picture in enumerate(pictures)]
        write_tar(folder / f"s-{i}.tar", members)
    status, told = ended(folder, lambda: rank_samples.main(folder))
    assert status == 0, told
    return {"folder": folder} | {count: torch.load(folder / f"{count}.pt") for count in (1, 2, 4)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_losses_are_those_of_one_process_with_the_whole_batch(found, case):
    alone = found[1][case]
    assert len(alone) == STEPS
    assert len(set(alone)) == STEPS
    for count in (2, 4):
        assert found[count][case] == pytest.approx(alone, rel=1e-5), count  # the log has six digits


def test_every_method_is_compared():
    assert {name.lower() for name in rank_samples.METHODS} == set(METHODS)
    assert {(name, cld) for name, cld, kind in CASES if kind == "images"} == {
        (name, cld) for name in rank_samples.METHODS for cld in (False, True)
    }


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case[0])
def test_two_machines_of_two_processes_have_the_losses_of_one_with_four(found, case):
    assert found[4]["2x2", case] == found[4][case]
    assert (found["folder"] / "2x2" / name_of(case, 4, "ddp") / "metrics.csv").exists()


def test_a_run_of_several_processes_goes_on_within_an_epoch_with_the_same_images_in_one(found):
    case = ("SimCLR", True, "stream")
    for count in (2, 4):
        assert found[1][count] == pytest.approx(found[1][case], rel=1e-5)


@pytest.mark.parametrize("case", SHARDED, ids=lambda case: "-".join(map(str, case)))
def test_encoders_in_parts_have_the_losses_of_whole_ones(found, case):
    folder, batch = found["folder"] / name_of(case, 2, "fsdp"), ("running_mean", "running_var", "batches_tracked")
    assert found[2]["fsdp", case] == pytest.approx(found[1][case], rel=1e-5)
    left = torch.load(folder / "weights.pt")
    encoder = step_of(*case).encoder
    before = float(total(encoder))
    encoder.load_state_dict(left)
    [seen] = logged(folder, "knn")  # what the monitor looks at is the whole encoder, of now
    assert seen == pytest.approx(float(total(encoder)), rel=1e-5)
    assert abs(seen - before) > 1e-4 * before
    assert len(list(folder.glob("checkpoints/*.shards"))) <= 3  # what no checkpoint names is removed
    whole = [name for name in checkpoints.read(Run(folder))["state_dict"] if not name.endswith(batch)]
    assert not [name for name in whole if "encoder." in name or ".ema.0." in name]


def test_checkpoints_in_parts_are_read_by_any_number_of_processes(found):
    """In parts by two; whole by two, and then in parts."""
    for goes_on in (found[1]["fsdp", 2, 1], found[4]["fsdp", 2, 4], found[4]["ddp", 2, 4]):
        assert goes_on == pytest.approx(found[1][VIT], rel=1e-5)


def test_a_damaged_part_is_named_with_the_checkpoint_that_is_whole(found, tmp_path):
    run = Run(tmp_path / "run")
    shutil.copytree(found["folder"] / name_of(VIT, 2, "fsdp"), run.path)
    parts = checkpoints.parts_of(run, checkpoints.read(run)).folder
    file = parts / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    whole = r"previous\.ckpt beside it is whole \(step 2\); to continue from there: cp \S+ \S+, then --resume again$"
    with pytest.raises(UserError, match=rf"{parts.name} is damaged.*__1_0.distcp.*; {whole}"):
        checkpoints.read(run)
    (parts / ".metadata").write_bytes(pickle.dumps(os.system))
    with pytest.raises(UserError, match=r"asks for posix\.system, which could run code; previous\.ckpt beside it"):
        checkpoints.read(run)
    shutil.rmtree(parts)
    with pytest.raises(UserError, match=rf"{parts.name} is not read: .*No such file.*; previous\.ckpt beside it"):
        checkpoints.read(run)


def test_what_cannot_be_right_in_parts_is_refused():
    with pytest.raises(UserError, match="--strategy fsdp: lars takes norms of whole layers: give --optimizer sgd or"):
        check_strategy("fsdp", "lars", "fp32")
    with pytest.raises(UserError, match="--strategy fsdp: give --precision bf16 or fp32"):
        check_strategy("fsdp", "sgd", "fp16")
    check_strategy("ddp", "lars", "fp16")


def test_a_device_needs_room_for_its_part_alone():
    step = step_of(*VIT)
    size = sum(4 * p.numel() for p in step.encoder.parameters())
    with pytest.raises(UserError, match="several --devices with --strategy fsdp") as told:
        check_memory(step, size)
    needed = float(re.search("keeps ([0-9.e-]+) GB", str(told.value))[1]) * 1e9
    in_parts = needed - (4 + 1) * size * 3 / 4  # with gradients and AdamW's state, and a twin without
    check_memory(step, round(1.01 * in_parts), 4)
    with pytest.raises(UserError, match="give more --devices"):
        check_memory(step, round(0.99 * in_parts), 4)


def test_what_is_not_told_is_asked_for(monkeypatch):
    own = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CROSSLEVEL_NODE")
    for name in ("SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", *own):
        monkeypatch.setenv(name, "")  # so that what the code sets goes with the test
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=r"^--nodes 4: NODE_RANK, MASTER_ADDR, MASTER_PORT not set: start one command"):
        world(2, 4)
    with pytest.raises(UserError, match="at least 1 each"):
        world(1, 0)
    monkeypatch.setenv("SLURM_NODEID", "3")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[07-09,12],login1")
    assert world(2, 4) == (2, 4, 6)
    assert os.environ["MASTER_ADDR"] == "gpu07"
    assert not is_first()
    assert world(2, 1) == (2, 1, 0)  # of one machine, nothing of this counts
    assert is_first()
    assert "MASTER_ADDR" not in os.environ
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in torchrun(5, 8, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert world(1, 1) == world(4, 2) == (4, 2, 5)
    with pytest.raises(UserError, match="torchrun started 4 processes on each of 2 machines: leave both out"):
        world(8, 1)


@pytest.mark.parametrize(
    ("changes", "goes_on"),
    [
        ({}, True),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, True),
        ({"TORCHELASTIC_RUN_ID": "another", "TORCHELASTIC_RESTART_COUNT": "2"}, False),
        ({"TORCHELASTIC_RUN_ID": "none"}, False),
    ],
)
def test_a_call_of_torchrun_goes_on_with_its_own_run_whatever_its_agent_counts(tmp_path, monkeypatch, changes, goes_on):
    told = torchrun(0, 2, 1, machines=2) | {"TORCHELASTIC_RESTART_COUNT": "0", "CROSSLEVEL_RUN": ""}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    run, ranks = str(tmp_path / "r"), world(1, 1)
    assert restarted(run, None, ranks) is None
    with claimed(run, "r", None, 0) as began:
        began.checkpoints.mkdir()
        began.last.touch()
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    assert restarted(run, None, ranks) == (run if goes_on else None)
    assert restarted(run, run, ranks) == run


def test_a_call_of_torchrun_without_a_name_is_known_by_its_store(tmp_path, monkeypatch):
    told = torchrun(0, 2, 1) | {"TORCHELASTIC_RUN_ID": "none", "CROSSLEVEL_RUN": ""}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    run, ranks = str(tmp_path / "r"), world(1, 1)
    with claimed(run, "r", None, 0) as began:
        began.checkpoints.mkdir()
        began.last.touch()
    for port, attempt, expected in (("1", "0", None), ("1", "1", run), ("2", "1", None)):
        monkeypatch.setenv("MASTER_PORT", port)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        assert restarted(run, None, ranks) == expected


@pytest.mark.parametrize(
    "changes", [{"TORCHELASTIC_USE_AGENT_STORE": "True"}, {"TORCHELASTIC_RUN_ID": "none"}, {"LOCAL_WORLD_SIZE": "2"}]
)
def test_a_torchrun_that_could_not_have_a_machine_replaced_is_warned_of(monkeypatch, changes):
    told = torchrun(0, 2, 1, machines=2) | {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    for name, value in (told | changes).items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        restarted("r", None, world(1, 1))
    one_machine = "LOCAL_WORLD_SIZE" in changes
    assert ["may not restart a training of several machines" in str(line.message) for line in said] == (
        [] if one_machine else [True]
    )


class TwoProcesses:
    """Of Fabric, what `check_step` asks for."""

    world_size, device = 2, torch.device("cpu")


@pytest.mark.parametrize("other", [3, 0])
def test_processes_that_go_on_from_different_checkpoints_are_refused(monkeypatch, other):
    def all_reduce(ends, operation):
        assert operation == torch.distributed.ReduceOp.MAX
        ends.copy_(torch.maximum(ends, torch.tensor([-other, other])))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    check_step(TwoProcesses, other)
    with pytest.raises(MachineError, match=f"different checkpoints .of step {min(5, other)} and of step 5.: give all"):
        check_step(TwoProcesses, 5)
