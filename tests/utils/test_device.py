"""The choice of device and precision."""

import pytest
import torch

from crosslevel.utils.device import choose


@pytest.fixture
def only_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def pretend_cuda(monkeypatch):
    """A CUDA device of the wanted compute capability."""

    def pretend(major):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretended GPU")

    return pretend


@pytest.mark.usefixtures("only_cpu")
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_an_error(device):
    with pytest.raises(ValueError, match=rf"device={device} is not available here: leave it at auto, or check your"):
        choose(device)


@pytest.mark.usefixtures("only_cpu")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_the_precision_that_was_asked_for_is_taken(precision):
    hardware = choose("auto", precision)
    assert (hardware.device.type, hardware.precision) == ("cpu", precision)
    assert hardware.why.startswith("cpu, ")
    assert hardware.why.endswith(f"{precision} (as asked)")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_autocast_computes_in_the_precision(precision, dtype):
    x = torch.ones(2, 2)
    with choose("cpu", precision).autocast():
        assert (x @ x).dtype == dtype


@pytest.mark.usefixtures("only_cpu")
@pytest.mark.parametrize(("instructions", "precision"), [(True, "bf16"), (False, "fp32")])
def test_bfloat16_only_where_the_processor_has_it(monkeypatch, instructions, precision):
    monkeypatch.setattr("crosslevel.utils.device._cpu_has_bf16", lambda: instructions)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    hardware = choose()
    assert hardware.precision == precision
    assert ("has no bfloat16" in hardware.why) is not instructions


@pytest.mark.parametrize(("major", "precision"), [(9, "bf16"), (8, "bf16"), (7, "fp32")])
def test_cuda_is_preferred_and_its_age_decides(pretend_cuda, major, precision):
    pretend_cuda(major)
    hardware = choose()
    assert (hardware.device.type, hardware.precision) == ("cuda", precision)
    assert hardware.why.startswith(f"cuda: Pretended GPU, {precision} (")


@pytest.mark.parametrize(("device", "precision"), [("tpu", "auto"), ("cpu", "fp8")])
def test_unknown_names_list_the_known_ones(device, precision):
    with pytest.raises(ValueError, match=rf"device={device}, precision={precision}: take one of \('auto', 'cpu'"):
        choose(device, precision)
