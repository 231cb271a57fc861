"""DINO: Caron, Touvron, Misra, Jégou, Mairal, Bojanowski, Joulin, "Emerging Properties in Self-Supervised Vision
Transformers", ICCV 2021.

From every view, a student predicts the output of its moving average, the teacher, for the other large views (eq. 3)::

    L = mean over large x and views x' != x of H(P_t(x), P_s(x')),   H(p, q) = - sum_k p_k log q_k
    P_s = softmax(g_s / T),   P_t = softmax((g_t - C) / T_t)

The centre C is a moving average of the teacher's outputs (eq. 4), and T_t rises while the training begins; T may follow
a schedule. There are no negatives. The head is a multi-layer perceptron to a unit feature and K weight-normalized
outputs of length 1; its units are ReLUs, as in the other heads here, while the authors use GELUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from crosslevel.methods.base import Method, feature_size, in_float32, scaled_gradient
from crosslevel.methods.memory import MomentumCopy, rising
from crosslevel.models.heads import Head, NormLinear
from crosslevel.models.schedules.temperature import Temperature, check_temperature
from crosslevel.utils.distributed import add, world_size
from crosslevel.utils.errors import UserError

MOMENTUM, WIDTH = 0.996, 512


class DINO(Method):
    """The student predicts the teacher's outputs for the two large views from every view."""

    online = 2
    later = ("momentum", "teacher_warmup")
    sgd_rate: ClassVar[float] = 0.03
    schedule: Temperature

    centre: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        images: int | None = None,
        *,
        temperature: float = 0.1,
        temperature_max: float | None = None,
        temperature_period: float | None = None,
        teacher_temperature: float = 0.07,
        teacher_temperature_start: float = 0.04,
        teacher_warmup: float | None = None,
        momentum: float | None = None,
        center_momentum: float = 0.9,
        outputs: int = 4096,
        freeze: float = 1.0,
        small_views: int = 8,
        head: Head = "mlp",
        out_features: int = 256,
        hidden: int | None = None,
    ) -> None:
        """Build the student's head and the teacher.

        Args:
            temperature: T, the student's; 0.1 in the paper.
            temperature_max: where a cosine schedule of T begins, from there to ``temperature`` and back (Kukleva et al.
                2023); constant unless given.
            temperature_period: epochs of the schedule's period; a fifth of the run unless given.
            teacher_temperature: T_t after its rise; 0.07 in the paper.
            teacher_temperature_start: T_t at the start; 0.04 in the paper.
            teacher_warmup: epochs in which T_t rises; 30 of 300 in the paper, a tenth of the run unless given.
            momentum: of the teacher's moving average at the start; it rises to 1. 0.996 in the paper; `train` chooses
                it by the number of steps.
            center_momentum: of the moving average C; 0.9 in the paper.
            outputs: K; 65,536 in the paper, too many for small collections and processors without a GPU.
            freeze: epochs in which the last layer is not trained; 1 in the paper.
            small_views: small crops an image, beside two large ones; 8 in the authors' code. Their size and area are
                settings of the views.
            head: up to the unit feature: linear, mlp, norm-linear or norm-mlp; MLPs have two hidden layers.
            out_features: d, the unit feature's size; 256 in the paper.
            hidden: units of each hidden layer; 2,048 in the paper, the encoder's feature size, but at least 512, unless
                given.

        """
        default_hidden = max(WIDTH, feature_size(encoder))
        super().__init__(encoder, head, out_features, hidden, hidden_layers=2, usual_hidden=default_hidden)
        self.set_temperature(temperature, temperature_max, temperature_period)
        check_temperature(teacher_temperature, "teacher_temperature")
        check_temperature(teacher_temperature_start, "teacher_temperature_start")
        if outputs < 2 or small_views < 0 or not 0 <= center_momentum < 1:
            raise UserError(
                f"outputs={outputs}, small_views={small_views}, center_momentum={center_momentum}: at least 2, at "
                "least 0, in [0, 1)"
            )
        self.teacher_temperature, self.teacher_warmup = teacher_temperature, teacher_warmup
        self.teacher_temperature_start = teacher_temperature_start
        self.momentum, self.center_momentum, self.outputs = momentum, center_momentum, outputs
        self.freeze, self.small_views, self.extra_views = freeze, small_views, small_views
        self.last = NormLinear(out_features, outputs)
        self.teacher = MomentumCopy(
            nn.Sequential(encoder, self.branch, self.last), MOMENTUM if momentum is None else momentum
        )
        self.register_buffer("centre", torch.zeros(outputs))
        self.moving: float | Tensor = 1.0
        self.sharpness: float | Tensor = teacher_temperature

    def begin_step(self, epoch: float | Tensor = 0.0) -> None:
        """Set both temperatures, and whether the last layer is trained."""
        super().begin_step(epoch)
        done = epoch / self.teacher_warmup if self.teacher_warmup else 1.0
        share = done.clamp(max=1.0) if isinstance(done, Tensor) else min(1.0, done)
        start = self.teacher_temperature_start
        self.sharpness = start + (self.teacher_temperature - start) * share
        self.moving = (epoch >= self.freeze).float() if isinstance(epoch, Tensor) else float(epoch >= self.freeze)

    def forward(
        self,
        views: Sequence[Float[Tensor, "B 3 h w"]],
        features: Sequence[Float[Tensor, "B D"]],
        index: Int64[Tensor, " B"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " K"]]:
        """The mean over all pairs of a teacher's view and another of the student's.

        The mean of the teacher's outputs is returned to update the centre.
        """
        teacher_outputs = torch.stack([self.encode_teacher(view) for view in views[:2]])
        with torch.autocast(index.device.type, enabled=False):
            goals = F.softmax((teacher_outputs - self.centre) / self.sharpness, dim=2)
            weight = F.normalize(scaled_gradient(self.last.weight, self.moving), dim=1)
            z = [self.project(h) for h in (*features[:2], *self.encode_small(views))]
            predictions = [F.log_softmax(rows @ weight.T / self.schedule.value, dim=1) for rows in z]
        losses = [
            -(goal * predictions[v]).sum(1).mean() for i, goal in enumerate(goals) for v in range(len(z)) if v != i
        ]
        return torch.stack(losses).mean(), teacher_outputs.mean((0, 1))

    @torch.no_grad()
    def encode_teacher(self, view: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B K"]:
        """The teacher's outputs; its head in float32 like the trained one's."""
        encoder, branch, last = self.teacher.ema.children()
        h = encoder(view)
        with torch.autocast(view.device.type, enabled=False):
            z: Tensor = last(in_float32(branch, h))
        return z

    def after_step(self, progress: float | Tensor = 0.0, *updates: Float[Tensor, " K"]) -> None:
        """Move the centre towards this step's outputs, of all ranks, and the teacher towards the student."""
        for mean in updates:
            self.centre.lerp_((add(mean) / world_size()).to(self.centre.dtype), 1 - self.center_momentum)
        self.teacher.momentum = rising(MOMENTUM if self.momentum is None else self.momentum, progress)
        self.teacher.update(nn.ModuleList([self.encoder, self.branch, self.last]))
