"""The training step is told in advance: no value of a tensor decides anything on the host, and none is copied there."""

import functools
import io
import tempfile
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crosslevel.cld.harmonization import Harmonization
from crosslevel.cld.loss import CrossLevel
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import InMemoryImages
from crosslevel.data.loaders.batches import Batch, TrainBatches
from crosslevel.methods import METHODS
from crosslevel.models.encoder import Encoder, View
from crosslevel.training.loop.fit import fit
from crosslevel.training.loop.module import Pretrain
from crosslevel.transforms.parameters import in_pieces
from crosslevel.transforms.views import Views
from crosslevel.utils.device import choose

WAITS = {
    "_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "equal", "is_nonzero", "bincount", "unique",
    "_unique2", "unique_dim", "repeat_interleave",
}  # fmt: skip
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
COPIES = {"_to_copy", "copy_", "_copy_from"}
SCHEDULE = {"temperature": 0.1, "temperature_max": 0.5, "temperature_period": 2}
ARGUMENTS = {
    "moco": {"queue": 16, **SCHEDULE}, "infomin": {"queue": 16, **SCHEDULE}, "npid": {"momentum": 0.5, **SCHEDULE},
    "byol": {"hidden": 16},
    "simclr": SCHEDULE, "simsiam": {"out_features": 16}, "vicreg": {"out_features": 16},
    "swav": {
        "prototypes": 12, "queue": 16, "small_views": 3, "queue_start": 0.1, "freeze": 0.1, "prior": 0.25, **SCHEDULE,
    },
    "dino": {"outputs": 12, "small_views": 3, "hidden": 16, "teacher_warmup": 0.3, "freeze": 0.1, **SCHEDULE},
}  # fmt: skip
MOVES = {"dino", "infomin", "moco", "npid", "simclr", "swav"}  # methods whose temperature may follow a schedule
VIEWS = {"infomin", "byol", "dino", "swav"}


class Refuses(TorchDispatchMode):
    """Fails at an operation for which the host would wait for the device, or that has a shape decided by values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        assert name not in WAITS, f"{name} waits for the device"
        if name in INDEXED:
            assert not any(t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1]) if t is not None), name
        out = function(*args, **(kwargs or {}))
        if name in COPIES:
            places = {t.device.type for t in [*tensors, *tree_leaves(out)] if isinstance(t, torch.Tensor)}
            assert len(places) == 1, f"{name} between {places}"
        return out


@pytest.mark.parametrize(
    "operation", [lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.unique()]
)
def test_what_waits_is_refused(operation):
    with pytest.raises(AssertionError), Refuses():
        operation(torch.arange(4.0))


@functools.cache
def teacher():
    with torch.random.fork_rng():  # made once: what is drawn after it must not depend on that
        encoder = Encoder("test_vit", image_size=16)
    encoder.view = View(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    return str(encoder.save(Path(tempfile.mkdtemp()) / "encoder.safetensors"))


def training(name, with_cld, batch, optimizer="sgd", **more):
    encoder = Encoder("resnet18", small_images=True, width=0.0625)
    arguments = (ARGUMENTS | {"distill": {"teacher": teacher()}}).get(name, {})
    method = METHODS[name](encoder, 20, **arguments, **more)
    method.online = max(method.online, 2) if with_cld else method.online
    views = Views(name if name in VIEWS else "cifar", size=12, erase=0.5, blur=0.5)
    views.count, views.small, views.plain = method.views, method.small_views, method.plain_views
    cld = CrossLevel(encoder.num_features, groups=batch // 2, **SCHEDULE) if with_cld else None
    gh = Harmonization(method.out_features, 0.5, 10, iterations=9, update_epochs=0.2, warmup_epochs=0.1)
    return Pretrain(
        encoder, method, cld, views, steps=10, warmup_steps=0, optimizer=optimizer, lr=0.1, weight_decay=1e-4, seed=0,
        gh=gh if with_cld else None,
    )  # fmt: skip


def batch_of(count, device="cpu"):
    images = torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, device=device)
    index = torch.arange(count, device=device)
    return Batch(images, index, index)


@pytest.fixture
def _as_elsewhere():
    """As on a device that is not a CPU."""
    with in_pieces(False):
        yield


@pytest.mark.usefixtures("_as_elsewhere")
@pytest.mark.parametrize("with_cld", [True, False], ids=["with CLD", "alone"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_step_waits_for_the_device(name, with_cld):
    """Views, forward, losses, backward, optimizer and what the method remembers; schedules as numbers and tensors."""
    module, batch = training(name, with_cld, 8), batch_of(8)
    assert (module.method.schedule is not None and module.method.schedule.high is not None) == (name in MOVES)
    take_steps(module, batch, "fp32", kept_from=2, count=3)


@pytest.mark.usefixtures("_as_elsewhere")
@pytest.mark.parametrize(
    ("name", "more", "parts"),
    [("npid", {"negatives": 5}, 1), ("npid", {"splits": 2}, 1), ("dino", {}, 1), ("moco", {}, 2)],
)
def test_no_step_in_bfloat16_waits_for_the_device(name, more, parts):
    """With negatives that are drawn, partners of the images, crops of two sizes from a loader, a batch in parts."""
    module, batch = training(name, True, 8, **more), batch_of(8)
    module.accumulate = parts
    if name == "dino":
        assert module.views.small_side < module.views.size
        numbers = torch.Generator().manual_seed(0)
        batch = batch._replace(images=torch.stack([module.views.crops(image, numbers) for image in batch.images]))
        assert batch.images.ndim == 5
    elif more == {"negatives": 5}:
        batch = batch._replace(partners=batch.images.flip(0))
    take_steps(module, batch, "bf16", kept_from=1, count=2)


def take_steps(module, batch, precision, kept_from, count):
    """Steps in which nothing may wait; from ``kept_from`` on with schedules in tensors, as a captured step has them."""

    def forward(part):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
            return module(part)

    optimizer = module.configure_optimizer()
    for number in range(count):
        if number == kept_from:
            module.keep_on(torch.device("cpu"), optimizer)
        module.begin_step(optimizer)
        with Refuses():
            optimizer.zero_grad()
            kept = module.gradients(batch, forward, torch.Tensor.backward)
            optimizer.step()
            module.end_step(*kept)
    module.check_finite()


@pytest.mark.usefixtures("_as_elsewhere")
@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_step_copies_to_or_from_the_host(name):
    """On pretended tensors of a GPU, which have a place and a shape, and no values: as the step is captured."""
    pretended = FakeTensorMode()
    module = training(name, True, 8)
    with pretended:
        batch = batch_of(8, "cuda")
        beside = getattr(module.method, "taught_by", ())
        for part in [*module.modules(), *(part for network in beside for part in network.modules())]:
            for own in (part._parameters, part._buffers):
                for key, value in own.items():
                    if value is not None:
                        there = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                        own[key] = torch.nn.Parameter(there) if value.requires_grad else there
        optimizer = module.configure_optimizer()
        module.keep_on(torch.device("cuda"), optimizer)
        module.begin_step(optimizer)
    with pretended, Refuses():
        loss, kept = module(batch)
        module.end_step(kept)
    assert loss.device.type == "cuda"


class Notes(TorchDispatchMode):
    """Notes after which steps of a training the host waited."""

    def __init__(self, module):
        super().__init__()
        self.module, self.steps = module, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in WAITS:
            self.steps.add(self.module.step)
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("_as_elsewhere")
@pytest.mark.parametrize("name", ["moco", "dino"])
def test_a_training_waits_for_the_device_where_it_logs_and_nowhere_else(tmp_path, name):
    """The loop around the step: losses, the best epoch, the watch for a collapse, progress; epochs of three steps."""
    data = torch.randint(256, (24, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batches = TrainBatches(InMemoryImages(data, [str(i) for i in range(24)]), 8, seed=0, bad_files=BadFiles())
    module = training(name, True, 8)
    module.steps = 6
    with Notes(module) as notes:
        fit(module, batches, tmp_path, hardware=choose("cpu", "fp32"), console=Console(file=io.StringIO()), log_every=2)
    assert notes.steps == {2, 3, 4, 6}  # steps 2 and 4 are logged, an epoch ends with 3 and 6
