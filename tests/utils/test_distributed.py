"""Two processes on halves of a batch do what one process does on the whole.

All checks share one start of the two processes; each returns what its rank computed.
"""

import copy
import socket
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reference import TinyEncoder, normal
from timm.layers import BatchNormAct2d
from torch import nn

from crosslevel.cld.harmonization import Harmonization
from crosslevel.cld.loss import CrossLevel
from crosslevel.methods import BYOL, DINO, NPID, MoCo, SimCLR, SimSiam, SwAV, VICReg
from crosslevel.methods.memory import InstanceBank, ShardedBank
from crosslevel.methods.simclr import nt_xent
from crosslevel.models.sync_batchnorm import SyncBatchNorm, SyncBatchNormAct, synchronize
from crosslevel.utils.distributed import gather, rank, shuffled, world_size

RANKS, BATCH = 2, 12
CLD = {
    "kmeans": {"groups": 5},
    "normalized-cut": {"groups": 4, "grouping": "normalized-cut"},
    "kmeans++": {"groups": 4, "init": "kmeans++"},
    "default groups": {},
}
METHODS = {
    "simclr": lambda encoder: SimCLR(encoder, out_features=4, hidden=6),
    "moco": lambda encoder: MoCo(encoder, out_features=4, queue=19),
    "npid": lambda encoder: NPID(encoder, BATCH, out_features=4),
    "vicreg": lambda encoder: VICReg(encoder, out_features=4, hidden=6),
    "simsiam": lambda encoder: SimSiam(encoder, out_features=4, hidden=6),
    "swav": lambda encoder: SwAV(encoder, out_features=4, prototypes=5, queue=16, small_views=1, prior=0.25),
    "dino": lambda encoder: DINO(encoder, out_features=4, outputs=5, small_views=1, hidden=6),
}


def part(whole):
    """This rank's rows."""
    return whole.chunk(world_size())[rank()].clone()


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().double()


def check_gather():
    x = part(torch.arange(8.0).view(4, 2)).requires_grad_()
    rows = gather(x)
    (rows * (1 + rank()) * torch.arange(8.0).view(4, 2)).sum().backward()
    indices = gather(part(torch.arange(6)))
    return {"rows": rows.detach(), "gradient": x.grad, "indices": indices, "where": (rank(), world_size())}


def check_gather_of_transposed():
    return gather(torch.arange(6.0).view(2, 3).T + 100 * rank())


def check_gather_leaves_other_gradients_alone():
    """The sum hands the same gradient to both of its terms."""
    x, other = torch.ones(3, requires_grad=True), torch.ones(3 * world_size(), requires_grad=True)
    kept = other * 1
    ((kept + gather(x)) * torch.arange(3.0 * world_size()) * (1 + rank())).sum().backward()
    return other.grad


def check_cld(name):
    cld = seeded(lambda: CrossLevel(6, out_features=4, gather=True, **CLD[name]))
    cld.generator = torch.Generator().manual_seed(3)
    h_a, h_b = (part(normal(i, BATCH, 6)).requires_grad_() for i in range(2))
    loss = cld(h_a, h_b)
    loss.backward()
    a, b, _ = cld.last
    return {
        "loss": loss.detach(),
        "h": torch.stack([h_a.grad, h_b.grad]),
        "weight": cld.branch[0].weight.grad,
        "sizes": torch.stack([a.sizes, b.sizes]),
    }


def check_simclr():
    z_a, z_b = (part(normal(i, BATCH, 6)).requires_grad_() for i in range(2))
    loss = nt_xent(*(torch.nn.functional.normalize(z, dim=1) for z in (z_a, z_b)), 0.3)
    loss.backward()
    return {"loss": loss.detach(), "h": torch.stack([z_a.grad, z_b.grad])}


def check_memories(build):
    """Losses and what is remembered over some steps."""
    encoder = TinyEncoder().double()
    method = seeded(lambda: build(encoder))
    losses = []
    for step in range(5):
        views = [part(normal(10 * step + i, BATCH, 3, 2, 2)) for i in range(2)]
        loss, kept = method(views, [encoder(views[0])], part(torch.arange(BATCH)))
        losses.append(loss.detach())
        with torch.no_grad():
            encoder.linear.weight.mul_(0.9)
        method.after_step(0.0, kept)
    return {"loss": torch.stack(losses), **{k: v for k, v in method.named_buffers()}}


def check_shuffled():
    mine = part(torch.arange(12))
    drawn, home = shuffled(mine)
    return {"drawn": drawn, "home": torch.equal(home(10 * drawn), 10 * mine)}


def check_shuffled_keys():
    """A key network whose every output is its batch's mean: which images were normalized together."""
    method = MoCo(TinyEncoder(), out_features=4, queue=19, splits=2)
    seen = []
    method.key.ema[0].forward = lambda x: (seen.append(x[:, 0, 0, 0]), x.flatten(1)[:, :5].float())[1]
    torch.manual_seed(5)
    views = part(torch.arange(BATCH).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).float())
    method.encode_key(views)
    return torch.stack(seen)


def check_byol():
    """Batch statistics in the heads and in the encoder, of the whole batch."""
    torch.manual_seed(0)
    norms = nn.BatchNorm2d(5), BatchNormAct2d(5, act_layer=nn.SiLU)
    encoder = nn.Sequential(nn.Conv2d(3, 5, 2), *norms, nn.Flatten()).double()
    encoder.num_features = 5
    method = BYOL(encoder, out_features=4, hidden=6).double()
    found = steps(encoder, method)
    kinds = [type(m) for m in (*encoder.modules(), *method.modules())]
    kinds = [kind for kind in kinds if issubclass(kind, nn.modules.batchnorm._BatchNorm)]
    expected = {SyncBatchNorm: len(kinds) - 2, SyncBatchNormAct: 2}
    return {"kinds": Counter(kinds) == expected, **found}


def check_method(build, with_cld):
    """Some steps of a method, alone or with groups of all ranks' images."""
    torch.manual_seed(0)
    encoder = TinyEncoder().double()
    method, cld = build(encoder).double(), CrossLevel(5, groups=5, out_features=4, gather=True).double()
    cld.generator = torch.Generator().manual_seed(3)
    return steps(encoder, method, cld if with_cld else None)


def steps(encoder, method, cld=None):
    """Losses of some steps of gradient descent, and all weights and statistics after them."""
    gh = Harmonization(4, categories=5, iterations=5, update_epochs=2) if cld is not None else None
    both = nn.ModuleList([encoder, method, *([] if cld is None else [cld, gh.double()])])
    synchronize(both)
    losses = []
    optimizer = torch.optim.SGD(both.parameters(), lr=0.1)
    for step in range(4):
        views = [part(normal(10 * step + i, BATCH, 3, 2, 2)) for i in range(max(2, method.views))]
        h = [encoder(view) for view in views[:2]]
        loss, kept = method(views, h, part(torch.arange(BATCH)))
        if cld is not None:
            gh.begin_step(step)
            loss = loss + 0.7 * cld(*h) + 0.3 * gh(*(method.project(x) for x in h))
        optimizer.zero_grad()
        loss.backward()
        for p in both.parameters():
            if p.grad is not None and world_size() > 1:
                dist.all_reduce(p.grad)
                p.grad /= world_size()
        optimizer.step()
        method.after_step(step / 4, kept)
        losses.append(loss.detach())
    return {"loss": torch.stack(losses), **both.state_dict()}


def check_sharded():
    """A bank in parts gives the rows, the updates and the saved state of a whole one."""
    torch.manual_seed(1)
    whole = InstanceBank(13, 4)
    sharded = ShardedBank(copy.deepcopy(whole))
    seen = []
    for step in range(6):
        index = torch.randperm(13, generator=torch.Generator().manual_seed(step))[:BATCH]
        z = torch.nn.functional.normalize(normal(step, BATCH, 4).float(), dim=1)
        seen.append((sharded(part(index)) - whole(part(index))).abs().max())
        drawn = sharded.draw(20)
        seen.append((sharded.common(drawn) - whole.common(drawn)).abs().max())
        for bank in (whole, sharded):
            bank.update(index, z)
    state = sharded.state_dict()
    seen.append((state["bank.rows"] - whole.rows).abs().max())
    again = ShardedBank(InstanceBank(13, 4))
    again(part(torch.arange(BATCH)))  # shares its own rows out first
    again.load_state_dict(state)
    seen.append((again(part(torch.arange(BATCH))) - whole(part(torch.arange(BATCH)))).abs().max())
    return {"difference": torch.stack(seen).max(), "rows": len(sharded.rows), "drawn": drawn, "length": len(sharded)}


def every_check():
    return {
        "shuffled": check_shuffled(),
        "shuffled keys": check_shuffled_keys(),
        "byol": check_byol(),
        "sharded": check_sharded(),
        "gather": check_gather(),
        "transposed": check_gather_of_transposed(),
        "other gradients": check_gather_leaves_other_gradients_alone(),
        "simclr": check_simclr(),
        "moco": check_memories(lambda encoder: MoCo(encoder, out_features=4, queue=19)),
        "npid": check_memories(lambda encoder: NPID(encoder, BATCH, out_features=4)),
        **{f"{name} steps": check_method(build, False) for name, build in METHODS.items()},
        **{f"{name} steps with CLD": check_method(build, True) for name, build in METHODS.items()},
        "npid in float16": check_memories(lambda encoder: NPID(encoder, BATCH, out_features=4, float16=True)),
        **{name: check_cld(name) for name in CLD},
    }


def run(process, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=process, world_size=RANKS)
    torch.save(every_check(), f"{folder}/{process}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two processes computed."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(run, (port, str(folder)), nprocs=RANKS, start_method="fork")
    return [torch.load(folder / f"{process}.pt") for process in range(RANKS)]


@pytest.fixture(scope="module")
def alone():
    """What one process computes."""
    return every_check()


def test_gather_keeps_rank_order_and_sums_gradients(ranks):
    whole = torch.arange(8.0).view(4, 2)
    for process, found in enumerate(each["gather"] for each in ranks):
        assert found["where"] == (process, RANKS)
        assert torch.equal(found["rows"], whole)
        assert torch.equal(found["gradient"], 3 * whole.chunk(2)[process])
        assert torch.equal(found["indices"], torch.arange(6))


def test_gather_takes_any_memory_layout(ranks):
    rows = torch.arange(6.0).view(2, 3).T
    for each in ranks:
        assert torch.equal(each["transposed"], torch.cat([rows, rows + 100]))


def test_gather_leaves_other_gradients_alone(ranks):
    for process, each in enumerate(ranks):
        assert torch.equal(each["other gradients"], torch.arange(6.0) * (1 + process))


def test_shuffled_rows_are_everyones_and_come_home(ranks, alone):
    drawn = torch.cat([each["shuffled"]["drawn"] for each in ranks])
    assert torch.equal(drawn.sort().values, torch.arange(12))
    assert not torch.equal(drawn, torch.arange(12))
    assert all(each["shuffled"]["home"] for each in (*ranks, alone))


def test_keys_are_normalized_in_random_parts_of_all_ranks_images(ranks, alone):
    parts = torch.cat([each["shuffled keys"] for each in ranks])
    assert parts.shape == (RANKS * 2, BATCH // RANKS // 2)
    assert torch.equal(parts.flatten().sort().values, torch.arange(BATCH).float())
    first = ranks[0]["shuffled keys"].flatten()
    assert (first < BATCH // 2).any()
    assert (first >= BATCH // 2).any()
    assert alone["shuffled keys"].shape == (2, BATCH // 2)
    assert torch.equal(alone["shuffled keys"].flatten().sort().values, torch.arange(BATCH).float())


def test_one_process_gathers_its_own_rows():
    x = torch.ones(3, 2)
    assert gather(x) is x
    assert (rank(), world_size()) == (0, 1)


@pytest.mark.parametrize("name", [*CLD, "simclr"])
def test_losses_and_gradients_are_those_of_the_whole_batch(ranks, alone, name):
    """The mean over ranks, which is what a distributed optimizer sees."""
    expected, found = alone[name], [each[name] for each in ranks]
    close = {"rtol": 1e-9, "atol": 1e-13}
    torch.testing.assert_close(torch.stack([f["loss"] for f in found]).mean(), expected["loss"], **close)
    torch.testing.assert_close(torch.cat([f["h"] for f in found], dim=1) / RANKS, expected["h"], **close)
    assert expected["h"].abs().max() > 1e-3
    if name in CLD:
        torch.testing.assert_close(sum(f["weight"] for f in found) / RANKS, expected["weight"], **close)
        assert all(torch.equal(f["sizes"], expected["sizes"]) for f in found)
        assert (expected["sizes"].sum(1) == BATCH).all()


@pytest.mark.parametrize("name", ["moco", "npid"])
def test_memories_are_those_of_the_whole_batch_on_every_rank(ranks, alone, name):
    expected, found = alone[name], [each[name] for each in ranks]
    torch.testing.assert_close(torch.stack([f["loss"] for f in found]).mean(0), expected.pop("loss"), rtol=1e-6, atol=0)
    assert expected
    for buffer, value in expected.items():
        for each in found:
            torch.testing.assert_close(each[buffer], value, rtol=1e-6, atol=1e-7)


def test_byol_synchronizes_every_batch_normalization(ranks):
    assert all(each["byol"]["kinds"] for each in ranks)


@pytest.mark.parametrize("name", ["byol", *(f"{name} steps{cld}" for name in METHODS for cld in ("", " with CLD"))])
def test_training_steps_are_those_of_the_whole_batch(ranks, alone, name):
    """Losses over some steps, and every weight, statistic and memory after them."""
    expected = {key: value for key, value in alone[name].items() if key not in ("loss", "kinds")}
    loss = alone[name]["loss"]
    assert loss.diff().abs().min() > 1e-4
    found = [each[name] for each in ranks]
    torch.testing.assert_close(torch.stack([f["loss"] for f in found]).mean(0), loss, rtol=1e-9, atol=0)
    for name, value in expected.items():
        for each in found:
            torch.testing.assert_close(each[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_a_sharded_bank_is_the_whole_bank(ranks, alone):
    assert alone["sharded"]["difference"] == 0
    assert alone["sharded"]["rows"] == 13
    for each in ranks:
        assert each["sharded"]["difference"] == 0
        assert each["sharded"]["length"] == 13
        assert torch.equal(each["sharded"]["drawn"], ranks[0]["sharded"]["drawn"])
    assert [each["sharded"]["rows"] for each in ranks] == [7, 6]
