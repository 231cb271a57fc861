"""Temperature, calibration error and limits, against scipy and by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from crosslevel.evaluation.labelling.calibration import calibration_error, limits, temperature


def drawn(n=4000, classes=5, factor=3.0):
    """Logits that are ``factor`` times too sure, and labels drawn from the probabilities that are right."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(n, classes, generator=generator)
    labels = torch.multinomial(true.softmax(1), 1, generator=generator).squeeze(1)
    return factor * true, labels


def test_the_temperature_undoes_what_was_too_sure_and_is_that_of_scipy():
    logits, labels = drawn()
    t = temperature(logits, labels)
    found = minimize_scalar(
        lambda x: float(F.cross_entropy(logits.double() / 10**x, labels)), bounds=(-2, 2), method="bounded"
    )
    assert t == pytest.approx(10**found.x, rel=1e-2)
    assert t == pytest.approx(3.0, rel=0.1)
    before, after = calibration_error(logits.softmax(1), labels), calibration_error((logits / t).softmax(1), labels)
    assert after < 0.03 < 0.15 < before


def test_the_calibration_error_by_hand():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    labels = torch.tensor([0, 1, 0, 1])
    assert calibration_error(probabilities, labels) == pytest.approx((2 * abs(0.9 - 0.5) + 2 * abs(0.6 - 1)) / 4)


@pytest.mark.parametrize("rejected", [0.0, 0.05, 0.2])
def test_limits_reject_the_share_that_was_asked_for(rejected):
    draws = np.random.default_rng(0)
    distance, probability = torch.tensor(draws.random(2000)), torch.tensor(draws.random(2000))
    found = limits(distance, probability, rejected)
    assert float(found.unknown(distance, probability).double().mean()) == pytest.approx(rejected, abs=0.02)
