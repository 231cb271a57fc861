"""Loads weight files of other programs into an existing network."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from crosslevel.utils.errors import NotThere, UserError
from crosslevel.utils.tensors import load_safetensors, load_tensors


def load_weights(backbone: nn.Module, file: str | Path) -> str:
    """Load starting weights, and say in one line what did not match.

    Classifier weights and prefixes such as ``module.`` or ``backbone.`` are expected and removed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no key matches, or the file is no file of weights.

    """
    if not Path(file).is_file():
        raise NotThere(f"encoder.weights={file}: there is no such file")
    expected, loaded = backbone.state_dict(), _strip(_read(Path(file)), set(backbone.state_dict()))
    fits = {k: v for k, v in loaded.items() if k in expected and v.shape == expected[k].shape}
    # Counters of batches have the same shape in every network, and do not count as a match.
    if all(k.endswith("num_batches_tracked") for k in fits):
        raise UserError(f"encoder.weights={file}: none of its {len(loaded)} keys fits the model's {len(expected)}")
    backbone.load_state_dict(fits, strict=False)
    missing = sorted(k for k in expected if k not in fits and not k.endswith("num_batches_tracked"))
    unused = sorted(k for k in loaded if k not in fits)
    initial, not_used = _names(missing), _names(unused)
    return f"{len(fits)} of {len(expected)} tensors loaded; kept their start: {initial}; not used: {not_used}"


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_safetensors(file)[0]
        read = load_tensors(file)
    except ValueError as error:
        raise UserError(f"encoder.weights={file}: not a file of weights: {error}") from error
    for key in ("state_dict", "model", "state_dict_ema"):
        if isinstance(read, dict) and isinstance(read.get(key), dict):
            read = read[key]
    if not isinstance(read, dict) or not any(isinstance(v, Tensor) for v in read.values()):
        raise UserError(f"encoder.weights={file}: it holds no dictionary of tensors")
    return {k: v for k, v in read.items() if isinstance(v, Tensor)}


def _strip(state: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    prefixes = ("module.", "model.", "backbone.", "encoder.", "encoder_q.", "base_encoder.")
    stripped = {}
    for name, value in state.items():
        key = name
        while key not in expected and (prefix := next((p for p in prefixes if key.startswith(p)), None)):
            key = key[len(prefix) :]
        stripped[key] = value
    return stripped


def _names(keys: list[str]) -> str:
    return ", ".join(keys) or "none"
