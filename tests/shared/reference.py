"""The formulas once more, in float64 NumPy loops, and what the tests share.

Every function takes complex arrays too: `gradient` is the complex step (Squire and Trapp 1998), which is
exact to rounding, so that losses and gradients can both be compared at 1e-6 or better.
"""

import numpy as np
import torch
from torch import nn


def gradient(function, x):
    """The derivative of a real-valued analytic ``function`` at the array ``x``."""
    out = np.empty(x.shape)
    for place in np.ndindex(x.shape):
        moved = x.astype(complex)
        moved[place] += 1e-30j
        out[place] = function(moved).imag / 1e-30
    return out


def unit(x):
    """Rows of length one."""
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def cross_entropy(logits, targets):
    """Mean of -log softmax; a logit of None is left out of the sum."""
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        total += (
            np.log(sum(np.exp(x - row[target].real) for x in row if x is not None)) + row[target].real - row[target]
        )
    return total / len(targets)


def means(z, assignment, groups, normalize=True):
    """The groups' centroids; None for an empty group."""
    out = []
    for j in range(groups):
        members = [z[i] for i in range(len(z)) if assignment[i] == j]
        mean = sum(members) / len(members) if members else None
        out.append(unit(mean) if normalize and members else mean)
    return out


def lloyd(z, seeds, iterations):
    """Cosine k-means from the points ``seeds``: the assignment. Repeated seeds stay empty."""
    points = unit(z)
    centroids = [points[i] for i in seeds]
    alive = [all(centroids[j] @ centroids[i] < 1 - 1e-6 for i in range(j)) for j in range(len(seeds))]
    assignment = []
    for _ in range(iterations):
        assignment = []
        for point in points:
            scores = [point @ c if lives else -np.inf for c, lives in zip(centroids, alive, strict=True)]
            assignment.append(int(np.argmax(scores)))
        for j in range(len(seeds)):
            members = [points[i] for i in range(len(points)) if assignment[i] == j]
            if members:
                centroids[j] = unit(sum(members))
    return np.array(assignment)


def plus_plus(z, groups, draws):
    """Seeds of k-means++ (Arthur and Vassilvitskii 2007) on the sphere, from uniform ``draws``."""
    points = unit(z)
    chosen = [int(draws[0] * len(points))]
    for j in range(1, groups):
        squared = [min(((p - points[c]) ** 2).sum() for c in chosen) for p in points]
        aim, i, reached = draws[j] * sum(squared), 0, squared[0]
        while reached <= aim:
            i += 1
            reached += squared[i]
        chosen.append(i)
    return chosen


def cld(z_a, z_b, groups_a, groups_b, groups, temperature, normalize=True):
    """The cross-level loss of unit features and given assignments."""

    def one_way(z, other_z, other):
        centroids = means(other_z, other, groups, normalize)
        logits = [[None if c is None else (x * c).sum() / temperature for c in centroids] for x in z]
        return cross_entropy(logits, other)

    return (one_way(z_a, z_b, groups_b) + one_way(z_b, z_a, groups_a)) / 2


def nt_xent(z_a, z_b, temperature):
    """SimCLR's loss of unit features (Chen et al. 2020, eq. 1)."""
    z, batch, total = np.concatenate([z_a, z_b]), len(z_a), 0.0
    for i in range(2 * batch):
        partner = (i + batch) % (2 * batch)
        others = sum(np.exp((z[i] * z[j]).sum() / temperature) for j in range(2 * batch) if j != i)
        total += np.log(others) - (z[i] * z[partner]).sum() / temperature
    return total / (2 * batch)


def info_nce(query, key, negatives, temperature):
    """MoCo's loss of unit features (He et al. 2020, eq. 1)."""
    total = 0.0
    for q, k in zip(query, key, strict=True):
        positive = (q * k).sum() / temperature
        total += np.log(np.exp(positive) + sum(np.exp((q * n).sum() / temperature) for n in negatives)) - positive
    return total / len(query)


def instance_softmax(z, index, bank, temperature, drawn=None):
    """NPID's loss of unit features (Wu et al. 2018, eq. 2), over all rows or the own and the drawn others."""
    total = 0.0
    for x, i in zip(z, index, strict=True):
        others = range(len(bank)) if drawn is None else drawn
        rows = [i] + [j for j in others if j != i]
        total += (
            np.log(sum(np.exp((x * bank[j]).sum() / temperature) for j in rows)) - (x * bank[i]).sum() / temperature
        )
    return total / len(z)


def linear(x, head):
    """A plain linear head's unit features, from its float64 weights."""
    return unit(x @ numpy(head[0].weight).T + numpy(head[0].bias))


def through(x, head):
    """A head's output, its batch normalization in training mode, from its float64 weights."""
    for layer in head:
        if isinstance(layer, nn.Linear):
            x = x @ numpy(layer.weight).T + (0 if layer.bias is None else numpy(layer.bias))
        elif isinstance(layer, nn.BatchNorm1d):
            centred = x - x.mean(0)
            x = centred / np.sqrt((centred**2).mean(0) + layer.eps)
            x = x * numpy(layer.weight) + numpy(layer.bias) if layer.affine else x
        else:
            x = np.where(x.real > 0, x, 0)
    return x


def log_softmax(logits):
    """Of each row."""
    top = logits.real.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def sinkhorn(scores, epsilon, iterations, prior, mass=None):
    """Assignments in turns, one sample and one prototype after the other (Caron et al. 2020, eq. 3 to 5)."""
    plan = np.exp((scores - scores.max()) / epsilon)
    mass = np.ones(len(plan)) if mass is None else mass
    mass = mass / mass.sum()
    plan = plan * mass[:, None]  # a sample without mass has none to give
    for _ in range(iterations):
        for k in range(plan.shape[1]):
            plan[:, k] *= prior[k] / plan[:, k].sum()
        for i in range(len(plan)):
            if mass[i]:
                plan[i] *= mass[i] / plan[i].sum()
    return plan / np.where(mass == 0, 1, plan.sum(1))[:, None]


def numpy(tensor):
    return tensor.detach().cpu().numpy()


def normal(seed, *shape, dtype=torch.float64):
    """Normally distributed numbers of their own seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class TinyEncoder(nn.Module):
    """(B, 3, 2, 2) -> (B, 5), without batch statistics: rows do not see one another."""

    num_features = 5

    def __init__(self, seed=0):
        super().__init__()
        self.linear = nn.Linear(12, 5)
        with torch.no_grad():
            self.linear.weight.copy_(normal(seed, 5, 12))
            self.linear.bias.copy_(normal(seed + 1, 5))

    def forward(self, x):
        return torch.tanh(self.linear(x.flatten(1)))
