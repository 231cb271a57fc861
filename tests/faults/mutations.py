"""Damage from a seeded mutator: what a stranger, a bad disk or a cut connection makes of a file."""

import numpy as np


def mutated(data, rng):
    """``data`` with one to four changes: bits, bytes, runs of zeros, pieces cut out or doubled, the end cut off."""
    made = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(made))) if made else 0
        end = min(len(made), at + int(rng.integers(1, 40)))
        match int(rng.integers(7)):
            case 0:
                made[at:end] = rng.integers(0, 256, end - at, np.uint8).tobytes()
            case 1:
                made[at:end] = bytes(end - at)
            case 2:
                made[at:end] = b"\xff" * (end - at)
            case 3:
                del made[at:end]
            case 4:
                made[at:at] = made[at:end]
            case 5 if made:
                made[at] ^= 1 << int(rng.integers(8))
            case _:
                del made[at:]
    return bytes(made)
