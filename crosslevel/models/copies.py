"""Copies of an encoder: with fresh weights, and for evaluation."""

from __future__ import annotations

import copy
import itertools

import torch
from timm.models.resnet import ResNet
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from crosslevel.models.encoder import Encoder


def untrained(encoder: Encoder, seed: int) -> Encoder:
    """A network of the same architecture with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Encoder(**encoder.structure())
    network.view, network.reads = encoder.view, encoder.reads
    return network


def frozen(encoder: Encoder) -> Encoder:
    """A copy for evaluation: no gradients, and a ResNet's batch normalizations folded into its convolutions."""
    copied = copy.deepcopy(encoder).eval().requires_grad_(False)
    if isinstance(copied.backbone, ResNet):
        for module in list(copied.backbone.modules()):
            children = dict(module.named_children())
            pairs = [(f"conv{n}", f"bn{n}") for n in (1, 2, 3)]
            if isinstance(module, nn.Sequential):
                pairs = list(itertools.pairwise(children))
            for first, second in pairs:
                conv, norm = children.get(first), children.get(second)
                if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                    setattr(module, first, fuse_conv_bn_eval(conv, norm))
                    setattr(module, second, nn.Identity())
    return copied
