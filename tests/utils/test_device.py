"""The choice of device and precision."""

import pytest
import torch

from crosslevel.utils.device import Machine, choose


class Pretended(Machine):
    """A machine with a CPU, and a GPU of the given compute capability if one is given."""

    def __init__(self, major=None, instructions=False):
        self.major, self.instructions = major, instructions

    def has(self, device):
        return device == "cpu" or (device == "cuda" and self.major is not None)

    def gpu(self):
        return "Pretended GPU", self.major

    def multiplies_bfloat16(self):
        return self.instructions


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_an_error(device):
    with pytest.raises(ValueError, match=rf"device={device} is not available here: leave it at auto, or check your"):
        choose(device, machine=Pretended())


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_the_precision_that_was_asked_for_is_taken(precision):
    hardware = choose("auto", precision, Pretended())
    assert (hardware.device.type, hardware.precision) == ("cpu", precision)
    assert hardware.reason.startswith("cpu, ")
    assert hardware.reason.endswith(f"{precision} (as set)")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_autocast_computes_in_the_precision(precision, dtype):
    x = torch.ones(2, 2)
    with choose("cpu", precision).autocast():
        assert (x @ x).dtype == dtype


@pytest.mark.parametrize(("instructions", "precision"), [(True, "bf16"), (False, "fp32")])
def test_bfloat16_only_where_the_processor_has_it(instructions, precision):
    hardware = choose(machine=Pretended(instructions=instructions))
    assert hardware.precision == precision
    assert ("has no bfloat16" in hardware.reason) is not instructions


@pytest.mark.parametrize(("major", "precision"), [(9, "bf16"), (8, "bf16"), (7, "fp32")])
def test_cuda_is_preferred_and_its_age_decides(major, precision):
    hardware = choose(machine=Pretended(major))
    assert (hardware.device.type, hardware.precision) == ("cuda", precision)
    assert hardware.reason.startswith(f"cuda: Pretended GPU, {precision} (")


@pytest.mark.parametrize(("device", "precision"), [("tpu", "auto"), ("cpu", "fp8")])
def test_unknown_names_list_the_known_ones(device, precision):
    with pytest.raises(ValueError, match=rf"device={device}, precision={precision}: take one of \('auto', 'cpu'"):
        choose(device, precision)
