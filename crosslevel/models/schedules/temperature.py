"""The temperature of a softmax over similarities: one value, or a schedule.

Kukleva, Böhle, Schiele, Kuehne, Rupprecht, "Temperature Schedules for Self-Supervised Contrastive Methods on Long-Tail
Data", ICLR 2023, algorithm 1: with epoch t and period P::

    T(t) = T_min + (T_max - T_min) (1 + cos(2 pi t / P)) / 2

A high temperature separates groups, a low one separates instances. The value is a function of the step alone, so that a
continued run needs no saved state.
"""

from __future__ import annotations

from torch import Tensor

from crosslevel.models.schedules import half_cosine
from crosslevel.utils.errors import UserError


class Temperature:
    """T, constant or on a schedule; with a schedule, `follow` sets it in each step.

    Attributes:
        value: the current T: a number, or a tensor if the step's number is one.

    Args:
        low: T_min; T itself without a schedule.
        high: T_max, where a schedule begins; None for none.
        period: P in epochs; it must be known before the first step.

    Raises:
        ValueError: a temperature or a period that is not positive, or a highest temperature that is not above the
            lowest.

    """

    def __init__(self, low: float, high: float | None = None, period: float | None = None) -> None:
        check_temperature(low)
        if high is not None and high <= low:
            raise UserError(
                f"temperature_max={high} must be above temperature={low}: between both the temperature moves"
            )
        if period is not None and period <= 0:
            raise UserError(f"temperature_period={period} must be positive: it is in epochs")
        if period is not None and high is None:
            raise UserError(f"temperature_period={period} is of a schedule: give temperature_max as well")
        self.low, self.high, self.period = low, high, period
        self.value: float | Tensor = low if high is None else high

    def follow(self, epoch: float | Tensor) -> None:
        """Set the value of a point in time, in epochs.

        Raises:
            ValueError: a schedule without a period.

        """
        if self.high is None:
            return
        if self.period is None:
            raise UserError("temperature_max needs temperature_period, in epochs")
        # The phase is computed first: for many epochs, float32 has few digits after the point.
        phase = 2 * ((epoch / self.period) % 1.0)
        self.value = self.low + (self.high - self.low) * half_cosine(phase)


def check_temperature(temperature: float, name: str = "temperature") -> None:
    """Refuse a temperature that is not positive."""
    if temperature <= 0:
        raise UserError(f"{name}={temperature} must be positive")
