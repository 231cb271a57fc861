"""What is computed in bfloat16 is right under each instruction set that this processor has, and each training asks."""

import io
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import InMemoryImages
from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.evaluation.finetune import FineTune, fine_tuned
from crosslevel.features.extract import Runtime
from crosslevel.methods import InfoMin
from crosslevel.models import numerics
from crosslevel.models.encoder import Encoder, View
from crosslevel.training.loop.fit import fit
from crosslevel.training.loop.module import Pretrain
from crosslevel.transforms.views import Views
from crosslevel.utils.device import Hardware

BF16 = Hardware(torch.device("cpu"), "bf16", "test")
ROOT = Path(__file__).parents[3]
SETS = {  # ONEDNN_MAX_CPU_ISA: what the processor needs for it
    "AVX2": {"avx2", "fma"},
    "AVX512_CORE": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "AVX512_CORE_BF16": {"avx512_bf16"},
    "AVX512_CORE_AMX": {"amx_tile", "amx_bf16"},
}
CASES = ["tests/models/test_numerics.py", "tests/training/loop/test_stability.py", "-k", "processor or few_steps"]


def flags():
    """The processor's features; none where Linux does not tell."""
    told = Path("/proc/cpuinfo")
    text = told.read_text() if platform.machine() == "x86_64" and told.is_file() else ""
    return set(text.partition("flags")[2].partition("\n")[0].split())


# OneDNN reads the variable once a process, at its first layer: before that one process imports everything for all.
EACH = """
import os, sys
import hypothesis, pytest, crosslevel.methods, crosslevel.training.loop.fit
folder, *names = sys.argv[1:]
for name in names:
    process = os.fork()
    if process == 0:
        os.environ["ONEDNN_MAX_CPU_ISA"] = name
        out = os.open(f"{folder}/{name}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1), os.dup2(out, 2)
        status = pytest.main(CASES)
        sys.stdout.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with open(f"{folder}/{name}.txt", "a") as file:
        file.write(f"\\nexit status {status}\\n")
"""


@pytest.fixture(scope="module")
def under(tmp_path_factory):
    """What the tests of `CASES` said under each instruction set that this processor has."""
    folder, names = tmp_path_factory.mktemp("sets"), [name for name in SETS if SETS[name] <= flags()]
    program = EACH.replace("CASES", repr(["-q", "-p", "no:cacheprovider", *CASES]))
    subprocess.run([sys.executable, "-c", program, folder, *names], cwd=ROOT, capture_output=True, check=True)
    return {name: (folder / f"{name}.txt").read_text(errors="replace") for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_gradients_and_trainings_under(name, under):
    if name not in under:
        pytest.skip("the processor has no such instructions")
    said = under[name]
    assert said.endswith("exit status 0\n"), said[-4000:]  # which is 5 where no test was found


@pytest.fixture
def strided_is_wrong(monkeypatch):
    """A processor that gets strided convolutions of 3x3 wrong. Collects what was measured and what was avoided."""
    measured, avoided = [], set()

    def wrong(layer, x, hardware):
        measured.append((layer, tuple(x.shape[1:])))
        return "weight gradient" if getattr(layer, "stride", 0) == (2, 2) and layer.weight.shape[-1] == 3 else ""

    def in_float32(layer, x):
        avoided.add(layer)
        return type(layer).forward(layer, x)

    monkeypatch.setattr(numerics, "_wrong", wrong)
    monkeypatch.setattr(numerics, "_in_float32", in_float32)
    return measured, avoided


LINE = (
    "bf16 is wrong on this processor: the weight gradient of {}layer2.0.conv1 (input 4x{}) and of 2 more layers; "
    "computed in float32 instead, see docs/numerics.md\n"
)


def pictures(count=16, size=24):
    pixels = torch.randint(
        0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return InMemoryImages(pixels, [f"{i}.png" for i in range(count)], torch.arange(count) % 2, ["a", "b"])


def strided(network):
    return [part for name, part in network.named_modules() if name.endswith(("2.0.conv1", "3.0.conv1", "4.0.conv1"))]


def test_pretraining_measures_views_and_pieces_and_spares_the_twin(strided_is_wrong, tmp_path):
    measured, avoided = strided_is_wrong
    torch.manual_seed(0)
    encoder = Encoder("resnet18", True, 0.0625)
    method = InfoMin(encoder, queue=16, hidden=8)
    views = Views("cifar", size=24)
    views.count, views.small, views.plain = method.views, method.small_views, method.plain_views
    module = Pretrain(
        encoder, method, None, views, steps=1, warmup_steps=0, optimizer="sgd", lr=0.1, weight_decay=0, seed=0
    )
    console = Console(file=io.StringIO())
    fit(module, TrainBatches(pictures(), 8, seed=0, bad_files=BadFiles()), tmp_path, hardware=BF16, console=console)
    assert {shape for layer, shape in measured if layer is encoder.backbone.conv1} == {(3, 24, 24), (3, 7, 7)}
    assert console.file.getvalue().startswith(LINE.format("backbone.", "24x24"))
    assert avoided == {*strided(encoder), *strided(method.key.ema[0])}
    assert len(avoided) == 6


def test_fine_tuning_says_once_what_it_avoids(strided_is_wrong):
    _, avoided = strided_is_wrong
    encoder, console = Encoder("resnet18", True, 0.0625), Console(file=io.StringIO())
    encoder.view = View(16)
    how = FineTune(epochs=1, batch_size=8)
    for seed in range(2):
        fine_tuned(
            encoder, pictures(), 2, pictures(), how, Runtime(BF16, workers=0), BadFiles(), seed=seed, console=console
        )
    assert console.file.getvalue() == LINE.format("backbone.", "16x16")
    assert len(avoided) == 2 * (3 + 3)  # of each training the network's, and those of its frozen copy for the queries
    assert not avoided & set(encoder.modules())
    fine_tuned(encoder, pictures(), 2, pictures(), how, Runtime(BF16._replace(precision="fp32"), 0), BadFiles())
    assert len(avoided) == 12
