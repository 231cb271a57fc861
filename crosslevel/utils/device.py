"""Chooses the device and precision of a command, with the reason."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, get_args

import torch

from crosslevel.utils.errors import UserError

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]


class Hardware(NamedTuple):
    """The chosen ``device`` and ``precision`` (bf16, fp16 or fp32), and one line for the user."""

    device: torch.device
    precision: str
    reason: str

    def autocast(self) -> AbstractContextManager[None]:
        """The context to run a network in."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")


class Machine:
    """The devices that PyTorch finds on this machine."""

    def has(self, device: str) -> bool:
        """Whether there is such a device."""
        if device == "cuda":
            return torch.cuda.is_available()
        return device == "cpu" or torch.backends.mps.is_available()

    def gpu(self) -> tuple[str, int]:
        """The name of the CUDA device, and the first number of its compute capability."""
        return torch.cuda.get_device_name(), torch.cuda.get_device_capability()[0]

    def multiplies_bfloat16(self) -> bool:
        """Whether the processor has instructions for bfloat16, and PyTorch uses them."""
        return multiplies_bfloat16()


HERE = Machine()


def choose(device: Device = "auto", precision: Precision = "auto", machine: Machine = HERE) -> Hardware:
    """Take the fastest device there is, and bfloat16 where its hardware computes it.

    Raises:
        ValueError: a device that this machine does not have, or an unknown name.

    """
    if device not in get_args(Device) or precision not in get_args(Precision):
        raise UserError(
            f"device={device}, precision={precision}: take one of {get_args(Device)}, {get_args(Precision)}"
        )
    if device == "auto":
        device = "cuda" if machine.has("cuda") else "mps" if machine.has("mps") else "cpu"
    if not machine.has(device):
        raise UserError(f"device={device} is not available here: leave it at auto, or check your PyTorch installation")
    name, fast, because = _describe(device, machine)
    resolved = precision if precision != "auto" else "bf16" if fast else "fp32"
    reason = because if precision == "auto" else "as set"
    return Hardware(torch.device(device), resolved, f"{name}, {resolved} ({reason})")


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16, and PyTorch uses them."""
    return bool(torch.backends.mkldnn.is_available() and _cpu_has_bf16())


def _describe(device: str, machine: Machine) -> tuple[str, bool, str]:
    """The device's name, whether it computes bfloat16, and the evidence."""
    if device == "cuda":
        name, major = machine.gpu()
        evidence = "tensor cores with bfloat16" if major >= 8 else "no bfloat16 before compute capability 8.0"
        return f"cuda: {name}", major >= 8, evidence
    if device == "mps":
        return "mps: Apple GPU", False, "the precision that all of its operations support"
    fast = machine.multiplies_bfloat16()
    evidence = "the processor has bfloat16 instructions" if fast else "the processor has no bfloat16 instructions"
    return f"cpu, {torch.get_num_threads()} threads", fast, evidence


def _cpu_has_bf16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch before 2.10
    return bool(supported and supported())
