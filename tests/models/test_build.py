"""Which networks of timm count as modern: those published with AdamW, stochastic depth and layer normalization."""

import pytest

from crosslevel.models.build import is_modern


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_224",
        "vit_small_patch14_reg4_dinov2.lvd142m",
        "vit_small_patch16_dinov3.lvd1689m",
        "vit_base_patch16_siglip_224",
        "vit_base_r50_s16_224",
        "vit_relpos_small_patch16_224",
        "samvit_base_patch16",
        "deit_small_patch16_224",
        "deit3_small_patch16_224",
        "beit_base_patch16_224",
        "eva02_tiny_patch14_224",
        "convnext_tiny",
        "convnextv2_nano",
        "test_convnext.r160_in1k",
        "timm:convnext_tiny.dinov3_lvd1689m",
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",
        "swinv2_cr_tiny_ns_224",
        "hiera_tiny_224",
        "caformer_s18",
        "mambaout_tiny",
        "cait_xxs24_224",
        "crossvit_tiny_240",
        "davit_tiny",
        "mvitv2_tiny",
        "naflexvit_base_patch16_gap",
        "pvt_v2_b0",
        "twins_svt_small",
        "volo_d1_224",
        "xcit_nano_12_p16_224",
    ],
)
def test_vits_convnexts_and_the_like_are_modern(name):
    assert is_modern(name)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50.a1_in1k",
        "timm:resnet50",
        "test_resnet",
        "resnext50_32x4d",
        "resnetv2_50",
        "regnety_016",
        "efficientnet_b0",
        "mobilenetv3_small_100",
        "vgg11",
        "densenet121",
        "hf-hub:owner/vit_small_patch16_224",
        "vit_small_patch16",
        "",
    ],
)
def test_other_networks_and_unknown_names_are_not(name):
    assert not is_modern(name)
