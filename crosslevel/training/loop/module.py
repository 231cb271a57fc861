"""The one place where encoder, method, CLD and views meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from timm.optim import Lars, param_groups_layer_decay
from torch import Tensor, nn

from crosslevel.cld.harmonization import Harmonization
from crosslevel.cld.loss import CrossLevel
from crosslevel.data.loaders.batches import Batch
from crosslevel.methods import Method
from crosslevel.methods.base import encode_in_parts
from crosslevel.models.encoder import Encoder
from crosslevel.models.heads import projection_head, stacked
from crosslevel.models.schedules import warmed_up
from crosslevel.transforms.philox import Counted
from crosslevel.transforms.views import Views
from crosslevel.utils.distributed import is_sharded, local
from crosslevel.utils.errors import NotFinite, UserError
from crosslevel.utils.rng import step_seed

Optimizer = Literal["sgd", "adamw", "lars"]
Forward = Callable[[Batch], tuple[Tensor, Any]]
SHARE = "lr_scale"  # timm's name for a group's share of the learning rate


class Pretrain(nn.Module):
    """One training step: L = L_I + λ L_G on a shared encoder, with geometric harmonization if requested.

    The views of image i in step n are drawn from (seed, n, i), on any device, for any number of ranks; all other random
    numbers of that step from (seed, n, rank). So a continued run repeats an uninterrupted one.

    With ``accumulate`` N a batch is encoded and compared in N parts, whose gradients make one step.

    Attributes:
        step: how many steps are done.
        epoch_steps: how many steps are an epoch; all of them unless given.
        rank: which of the processes of a distributed run this is.

    """

    def __init__(
        self,
        encoder: Encoder,
        method: Method,
        cld: CrossLevel | None,
        views: Views,
        *,
        steps: int,
        warmup_steps: int,
        optimizer: Optimizer,
        lr: float,
        weight_decay: float,
        seed: int,
        epoch_steps: int | None = None,
        gh: Harmonization | None = None,
        encoder_rate: float = 1.0,
        layer_decay: float = 1.0,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        self.encoder, self.method, self.cld, self.gh, self.views = encoder, method, cld, gh, views
        self.steps, self.warmup_steps, self.seed = steps, warmup_steps, seed
        self.epoch_steps = epoch_steps or steps
        self.optimizer_name, self.lr, self.weight_decay = optimizer, lr, weight_decay
        self.encoder_rate, self.layer_decay, self.accumulate = encoder_rate, layer_decay, accumulate
        self.step, self.rank = 0, 0
        self.shared_generator = torch.Generator()
        self.losses: dict[str, Tensor] = {}
        self.defect: Tensor | None = None
        self.now: Tensor | None = None  # the step's number, if the step is captured
        # A method's memory is the same on all ranks, or meant to differ: DDP need not synchronize it in every step.
        self._ddp_params_and_buffers_to_ignore = remembered(method, "method")
        if gh is not None:
            self._ddp_params_and_buffers_to_ignore += remembered(gh, "gh")
        if cld is not None:
            # Groups over all ranks must start from the same points on each rank.
            cld.generator = self.shared_generator

    def train_on(self, encoder: Encoder) -> None:
        """Replace the trained encoder by a copy of it; before the first step, or after the last."""
        self.encoder = encoder
        self.method.train_on(encoder)

    def begin_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Seed the step, and set its learning rate."""
        torch.manual_seed(step_seed(self.seed, self.step, self.rank))
        self.shared_generator.manual_seed(step_seed(self.seed, self.step, -1))
        rate = self.lr * warmed_up(self.step, self.steps, self.warmup_steps)
        for group in optimizer.param_groups:
            group_rate = rate * group.get(SHARE, 1.0)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(group_rate)
            else:
                group["lr"] = group_rate
        if self.now is not None:
            self.now.fill_(self.step)

    def keep_on(self, device: torch.device, optimizer: torch.optim.Optimizer) -> None:
        """Keep values that change from step to step in tensors, so that a captured step can be replayed."""
        self.now = torch.full((), self.step, device=device)
        for group in optimizer.param_groups:
            group["lr"], group["fused"], group["foreach"] = torch.full((), self.lr, device=device), True, False

    def gradients(self, batch: Batch, forward: Forward, backward: Callable[[Tensor], Any]) -> list[Any]:
        """Add the gradients of a batch's mean loss, part by part; what `end_step` needs of each part.

        Args:
            batch: all images of the step.
            forward: this module, or what wraps it.
            backward: adds the gradients of a loss.

        """
        if self.accumulate == 1:
            loss, updates = forward(batch)
            backward(loss)
            return [updates]
        split = [[None] * self.accumulate if t is None else t.tensor_split(self.accumulate) for t in batch]
        each_updates, total = [], dict[str, Tensor]()
        for part in map(Batch._make, zip(*split, strict=True)):
            share = len(part.index) / len(batch.index)
            loss, updates = forward(part)
            backward(loss * share)
            each_updates.append(updates)
            total = {name: share * value + total.get(name, 0.0) for name, value in self.losses.items()}
        self.losses = total
        return each_updates

    def forward(self, batch: Batch) -> tuple[Tensor, Any]:
        """The loss of one batch, and the tensors that the method needs in `end_step`.

        The online views are normalized in as many parts as the method's ``splits``.
        """
        numbers = Counted(self.seed, self.step if self.now is None else self.now, batch.index)
        views = [
            v.contiguous(memory_format=torch.channels_last) for v in self.views(batch.images, numbers, batch.partners)
        ]
        self._pass_epoch()
        online = views[: self.method.online]
        features = [encode_in_parts(self.encoder, view, self.method.splits) for view in online]
        instance, updates = self.method(views, features, batch.index)
        group = self.cld.weight * self.cld(*features[:2]) if self.cld is not None else instance.new_zeros(())
        loss: Tensor = instance + group
        if self.gh is not None:
            harmony = self.gh.weight * self.gh(*(self.method.project(h) for h in features[:2]))
            loss = loss + harmony
        self.losses = {"loss": loss.detach(), "instance_loss": instance.detach()}
        if self.cld is not None:
            self.losses["group_loss"] = group.detach()
        if self.gh is not None:
            self.losses["harmonization_loss"] = harmony.detach()
        self._remember_first_defect()
        return loss, updates

    def _pass_epoch(self) -> None:
        """Pass the epoch to all branches: a number, or a tensor if the step is captured."""
        epoch = (self.step if self.now is None else self.now) / self.epoch_steps
        for part in (self.method, self.cld, self.gh):
            if part is not None:
                part.begin_step(epoch)

    def _remember_first_defect(self) -> None:
        """Store the losses of the first step whose loss is no number, on the device, so that no step waits for it."""
        losses = torch.stack([value.float() for value in self.losses.values()])
        step = losses.new_full((1,), self.step) if self.now is None else self.now.to(losses.dtype).view(1)
        now = torch.cat([losses, step + 1])
        if self.defect is None:
            self.defect = torch.full_like(now, torch.nan)
        is_first = self.defect[-1].isnan() & ~losses[0].isfinite()
        self.defect.copy_(torch.where(is_first, now, self.defect))

    def end_step(self, *updates: Any) -> None:
        """Count the step, and update the method's memory: before any checkpoint of this step is written."""
        self.remember(*updates)
        self.step += 1

    def remember(self, *updates: Any) -> None:
        """Update the method's memory with the second result of `forward`, of each part, after the current step."""
        if self.now is None:
            self.method.after_step(min(1.0, (self.step + 1) / self.steps), *updates)
        else:
            self.method.after_step((self.now + 1) / self.steps, *updates)

    def configure_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the settings, with weight decay as usual for it."""
        # Sharded parameters need other kernels: no parameter group mixes them with unsharded ones.
        groups = [
            {**group, "params": params}
            for group in self._parameter_groups()
            for params in _by_sharding(group["params"])
        ]
        if self.optimizer_name == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=0.9)
        if self.optimizer_name == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr)
        # Without decay, timm's LARS is plain SGD unless it is set to adapt; parameters excluded from decay stay plain
        # SGD.
        for group in groups:
            group["always_adapt"] = all(p.ndim > 1 for p in group["params"])
        return Lars(groups, lr=self.lr, momentum=0.9)

    def trained_names(self) -> list[str]:
        """The names of the trained parameters, in the order of an optimizer without sharding."""
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        return [names[id(p)] for group in self._parameter_groups() for p in group["params"]]

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Trained parameters with their decay and, if the encoder has its own rates, their share of the rate."""
        decay_all = self.optimizer_name == "sgd"
        if self.encoder_rate == self.layer_decay == 1.0:
            return parameter_groups(self, self.weight_decay, decay_all)
        network = self.encoder.backbone
        exempt: Any = getattr(network, "no_weight_decay", tuple)
        encoder_groups = param_groups_layer_decay(
            network, self.weight_decay, () if decay_all else exempt(), layer_decay=self.layer_decay,
            weight_decay_exclude_1d=not decay_all,
        )  # fmt: skip
        for group in encoder_groups:
            group[SHARE] *= self.encoder_rate
        heads = nn.ModuleDict({"method": self.method, **({} if self.cld is None else {"cld": self.cld})})
        return [*encoder_groups, *(g for g in parameter_groups(heads, self.weight_decay, decay_all) if g["params"])]

    def values(self) -> dict[str, float]:
        """The last step's losses and figures, for the log."""
        out = {name: float(value) for name, value in self.losses.items()}
        out["lr"] = self.lr * warmed_up(max(self.step - 1, 0), self.steps, self.warmup_steps)
        for name, branch in (("temperature", self.method), ("group_temperature", self.cld)):
            if branch is not None and branch.schedule is not None and branch.schedule.high is not None:
                out[name] = float(branch.schedule.value)
        if self.cld is not None and self.cld.last is not None:
            sizes = torch.stack([self.cld.last.a.sizes, self.cld.last.b.sizes])
            out["group_agreement"] = float(self.cld.last.agreement)
            out["groups_used"] = float((sizes > 0).sum(1).float().mean())
            out["largest_group"] = float(sizes.amax(1).float().mean())
        return out

    def check_finite(self) -> None:
        """Stop the run on a loss that is no number.

        Raises:
            NotFinite: the message has all losses.

        """
        if self.defect is None or bool(self.defect[-1].isnan()):
            return
        *losses, step = self.defect.tolist()
        first = ", ".join(f"{name} {value:.4g}" for name, value in zip(self.losses, losses, strict=True))
        broken = [name for name, p in self.named_parameters() if not bool(local(p).isfinite().all())]
        extent = (
            f"{len(broken)} parameters are not finite, {broken[0]} first" if broken else "all parameters are finite"
        )
        rate = self.lr * warmed_up(int(step) - 1, self.steps, self.warmup_steps)
        raise NotFinite(
            f"the loss is no longer a number from step {step:.0f} on: {first}, lr {rate:.4g}; {extent} at step "
            f"{self.step}. Lower --lr or raise --warmup_epochs; if that does not help, try --precision fp32"
        )


def share_hidden(method: Method, cld: CrossLevel) -> None:
    """Share the hidden layer between both heads; only the last layers are separate.

    Raises:
        UserError: the heads have no hidden layer, or layers of different size.

    """
    a, b = method.branch, cld.branch
    same = len(a) == len(b) == 3 and a[0].weight.shape == b[0].weight.shape
    if not same:
        raise UserError(
            f"share_hidden needs two MLP heads alike: method.head={method.head} has {_layers(a)}, cld.head={cld.head} "
            f"has {_layers(b)}"
        )
    b[0] = a[0]


def connect(method: Method, cld: CrossLevel) -> None:
    """Build the group branch on the features that ``cld.on`` names; on the instance head, it trains that head too.

    Raises:
        UserError: the group branch cannot use the instance head.

    """
    if cld.on == "instance":
        cld.in_features = method.out_features
        group_head = projection_head(cld.head, method.out_features, cld.out_features, cld.hidden)
        cld.branch = stacked(method.branch, group_head)
    elif cld.on == "shared":
        if any(isinstance(layer, nn.BatchNorm1d) for layer in method.branch):
            raise UserError(
                f"cld.on=shared: the head of {type(method).__name__} normalizes its batch: take NPID, MoCo or InfoMin"
            )
        cld.head, cld.out_features, cld.hidden = method.head, method.out_features, method.hidden
        cld.branch = method.branch


def _layers(head: nn.Sequential) -> str:
    return " > ".join(type(layer).__name__ for layer in head)


def _by_sharding(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Split parameters into unsharded and sharded ones."""
    sharded = [p for p in parameters if is_sharded(p)]
    unsharded = [p for p in parameters if not is_sharded(p)]
    return [group for group in (unsharded, sharded) if group] if sharded else [parameters]


def remembered(method: nn.Module, prefix: str) -> list[str]:
    """The names of a method's buffers, without the statistics of batch normalization."""
    return [
        ".".join(part for part in (prefix, path, name) if part)
        for path, module in method.named_modules()
        if not isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, _ in module.named_buffers(recurse=False)
    ]


def parameter_groups(module: nn.Module, weight_decay: float, decay_all: bool) -> list[dict[str, Any]]:
    """Trained parameters; biases and normalization weights are decayed only with ``decay_all``."""
    trained = [p for p in module.parameters() if p.requires_grad]
    if decay_all:
        return [{"params": trained, "weight_decay": weight_decay}]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
