"""CLD in a training loop of one's own: the two lines that are marked.

python examples/own_loop.py
"""

import torch
from torch import nn
from torch.nn import functional as F

import crosslevel


def main(steps: int = 30) -> list[float]:
    """The loss of each step: of pictures of 8 colours, each seen twice with noise."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Linear(32, 16)
    cld = crosslevel.CrossLevel(in_features=32, groups=8, temperature=0.2)  # the first line
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters(), *cld.parameters()], lr=0.01)
    colours, losses = torch.rand(8, 3, 1, 1), []
    for _ in range(steps):
        images = colours[torch.randint(8, (64,))].expand(64, 3, 16, 16)
        h_a, h_b = (backbone(images + 0.2 * torch.randn_like(images)) for _ in "ab")
        z_a, z_b = (F.normalize(head(h), dim=1) for h in (h_a, h_b))
        loss = F.cross_entropy(z_a @ z_b.T / 0.2, torch.arange(len(images)))
        loss = loss + 0.25 * cld(h_a, h_b)  # the second line
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; images find their group in the other view: "
          f"{100 * cld.last.agreement:.0f} %")  # fmt: skip
    return losses


if __name__ == "__main__":
    main()
