"""Images of several sizes for a network that is built for one."""

from __future__ import annotations

from timm.layers.format import Format
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def take_any_size(backbone: nn.Module) -> int | None:
    """Let a timm ViT take other sizes as well: its position embeddings are resampled for each of them.

    This is timm's ``dynamic_img_size``, but for a network that is built already; its weights, and its outputs for
    images of its own size, do not change. Networks that timm builds with it, such as DINOv3's ViTs, stay as they are.

    Returns:
        the side of its patches (sizes must be multiples of it); None if the network does not support this, and stays as
        it is.

    """
    patches = getattr(backbone, "patch_embed", None)
    fits = isinstance(backbone, VisionTransformer) or bool(getattr(backbone, "dynamic_img_size", False))
    if not fits or type(patches) is not PatchEmbed:
        return None
    vars(backbone)["dynamic_img_size"] = True  # timm declares it final, for TorchScript
    patches.strict_img_size, patches.flatten, patches.output_fmt = False, False, Format.NHWC
    return int(patches.patch_size[0])
