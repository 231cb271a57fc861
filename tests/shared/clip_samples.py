"""A tiny CLIP in the files of the hub's CLIPs, and what its text tower makes of words by a loop in float64."""

import json

import numpy as np
import timm
import torch
from safetensors.torch import save_file

WIDTH, HEADS, LAYERS, LENGTH, EMBED = 32, 2, 2, 12, 24
ARGUMENTS = {"img_size": 32, "pre_norm": True}
SWAPS = (
    ("patch_embed.proj", "conv1"), ("pos_embed", "positional_embedding"), ("norm_pre", "ln_pre"), ("norm1", "ln_1"),
    ("norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("attn.qkv.", "attn.in_proj_"),
    ("attn.proj", "attn.out_proj"), ("blocks.", "transformer.resblocks."), ("cls_token", "class_embedding"),
)  # fmt: skip


def table(merges=("c a", "ca t</w>", "d o", "do g</w>")):
    """A tokenizer.json of single bytes and a few merges."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(m.split()) for m in merges)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return {"model": {"type": "BPE", "vocab": vocabulary, "merges": list(merges)}}


def text_state(words, seed=0):
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draws) * 0.2

    state = {
        "token_embedding.weight": normal(words, WIDTH), "positional_embedding": normal(LENGTH, WIDTH),
        "ln_final.weight": 1 + normal(WIDTH), "ln_final.bias": normal(WIDTH), "text_projection": normal(WIDTH, EMBED),
    }  # fmt: skip
    for i in range(LAYERS):
        block = f"transformer.resblocks.{i}."
        for name in ("ln_1", "ln_2"):
            state |= {f"{block}{name}.weight": 1 + normal(WIDTH), f"{block}{name}.bias": normal(WIDTH)}
        for name, out, into in (
            ("attn.out_proj", WIDTH, WIDTH), ("mlp.c_fc", 4 * WIDTH, WIDTH), ("mlp.c_proj", WIDTH, 4 * WIDTH)
        ):  # fmt: skip
            state |= {f"{block}{name}.weight": normal(out, into), f"{block}{name}.bias": normal(out)}
        state |= {
            f"{block}attn.in_proj_weight": normal(3 * WIDTH, WIDTH),
            f"{block}attn.in_proj_bias": normal(3 * WIDTH),
        }
    return state


def visual_state(model):
    """timm's weights under the names that CLIP's have."""
    state = {}
    for theirs, value in model.state_dict().items():
        name = theirs.replace("norm.", "ln_post.") if theirs.startswith("norm.") else theirs
        for new, old in SWAPS:
            name = name.replace(new, old)
        flat = {"class_embedding": (-1,), "positional_embedding": value.shape[1:]}.get(name, value.shape)
        state[f"visual.{name}"] = value.reshape(flat).contiguous()
    state["visual.proj"] = torch.randn(model.num_features, EMBED, generator=torch.Generator().manual_seed(9)) * 0.2
    return state


def write_clip(folder, quick_gelu=True, seed=0, name="test_vit", arguments=ARGUMENTS):
    """The files of a CLIP with this network of timm's; returns its weights."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=0, **arguments)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    words = table()
    state = visual_state(model) | text_state(len(words["model"]["vocab"]), seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "open_clip_model.safetensors")
    text = {
        "context_length": LENGTH,
        "vocab_size": len(words["model"]["vocab"]),
        "width": WIDTH,
        "heads": HEADS,
        "layers": LAYERS,
    }
    config = {"model_cfg": {"embed_dim": EMBED, "quick_gelu": quick_gelu, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(words))
    about = {
        "input_size": [3, 32, 32],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    (folder / "config.json").write_text(
        json.dumps({"architecture": name, "num_classes": EMBED, "model_args": arguments, "pretrained_cfg": about})
    )
    return state


def by_hand(state, numbers, quick_gelu=True):
    """The text tower in float64 (Radford et al. 2021), one text, place by place."""
    w = {name: value.double().numpy() for name, value in state.items()}
    length = len(numbers)
    x = w["token_embedding.weight"][numbers] + w["positional_embedding"][:length]

    def norm(x, name):
        scaled = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for i in range(LAYERS):
        block, size = f"transformer.resblocks.{i}", WIDTH // HEADS
        y = norm(x, f"{block}.ln_1")
        q, k, v = np.split(y @ w[f"{block}.attn.in_proj_weight"].T + w[f"{block}.attn.in_proj_bias"], 3, 1)
        heads = []
        for h in range(HEADS):
            part = slice(h * size, (h + 1) * size)
            rows = []
            for place in range(length):
                scores = k[: place + 1, part] @ q[place, part] / np.sqrt(size)
                chance = np.exp(scores - scores.max())
                rows.append((chance / chance.sum()) @ v[: place + 1, part])
            heads.append(np.array(rows))
        x = x + linear(np.concatenate(heads, 1), f"{block}.attn.out_proj")
        y = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        if quick_gelu:
            y = y / (1 + np.exp(-1.702 * y))
        else:
            y = y * 0.5 * (1 + np.vectorize(__import__("math").erf)(y / np.sqrt(2)))
        x = x + linear(y, f"{block}.mlp.c_proj")
    out = norm(x, "ln_final")[int(np.argmax(numbers))] @ w["text_projection"]
    return out / np.linalg.norm(out)
