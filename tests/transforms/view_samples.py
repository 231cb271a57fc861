"""Images, one view of them by torchvision, and how equal views are."""

import torch
import torchvision.transforms.v2.functional as reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed))


def one_view(image: torch.Tensor, drawn, i: int, size: int, crop: bool) -> torch.Tensor:
    """View i as torchvision's operations make it, one after the other, from the same parameters."""
    x = image.float() / 255
    if crop:
        box = drawn.boxes[i].int().tolist()
        x = reference.resized_crop(x, *box, size=[size, size], antialias=True)
    if drawn.flip[i]:
        x = reference.horizontal_flip(x)
    jitter = [
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    ]
    for operation in drawn.order[i].tolist() if drawn.jitter[i] else []:
        x = jitter[operation](x, float(drawn.factors[i, operation]))
    if drawn.grayscale[i]:
        x = reference.rgb_to_grayscale(x, num_output_channels=3)
    if drawn.blur[i]:
        taps = 2 * min(8, size - 1) + 1  # four deviations of the presets' largest blur, 2 pixels
        x = reference.gaussian_blur(x, [taps, taps], [float(drawn.sigma[i])] * 2)
    if drawn.solarize[i]:
        x = reference.solarize(x, 0.5)
    x = reference.normalize(x, list(MEAN), list(STD))
    if drawn.erase[i]:
        x = reference.erase(x, *drawn.erase_boxes[i].int().tolist(), v=torch.zeros(3, 1, 1))
    return x


def assert_equal_views(ours: torch.Tensor, theirs: torch.Tensor, solarized: torch.Tensor) -> None:
    """Within 1e-4 after normalization (1e-5 before, times 1 / std, over several steps).

    Solarization jumps at 0.5, where the last bit decides: one pixel in a thousand may fall on the other side.
    """
    wrong = (ours - theirs).abs() > 1e-4
    assert not wrong[~solarized].any()
    assert wrong.float().mean() < 1e-3
