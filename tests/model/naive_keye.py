"""The whole network once more, short and slow: eager, with masks of tokens x tokens, sharing no code with openkeye.

Made from the published description. `record_case` writes random weights and what this code computes with them in the format
that `openkeye check` reads.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file


def make_config(**changes) -> dict:
    """A small configuration of every part; nested tables are changed with `vision_config=dict(...)` and the like."""
    config = {
        "model_type": "KeyeVL2", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True,
        "vocab_size": 64, "tie_word_embeddings": False, "rope_theta": 1e7, "rms_norm_eps": 1e-6, "attention_bias": False,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        "sa_config": {"indexer_num_heads": 4, "indexer_head_dim": 16, "topk": 8},
        "image_token_id": 60, "video_token_id": 61, "an_unknown_key": {"is": "kept"},
        "vision_config": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "image_size": 56,
            "patch_size": 14, "spatial_merge_size": 2,
        },
    }  # fmt: skip
    for key, value in changes.items():
        is_table = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = {**config[key], **value} if is_table else value
    return config


def make_weights(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random fp32 tensors under the published names."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        fan_in = shape[1] if len(shape) == 3 else shape[-1] if len(shape) == 2 else 25
        return torch.randn(shape, generator=generator) * fan_in**-0.5 + (1.0 if len(shape) == 1 else 0.0)

    hidden, wide, narrow = config["hidden_size"], config["head_dim"], config["moe_intermediate_size"]
    num_q, num_kv, num_experts = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "num_experts"))
    num_j, index = config["sa_config"]["indexer_num_heads"], config["sa_config"]["indexer_head_dim"]
    weights = {"model.embed_tokens.weight": draw(config["vocab_size"], hidden) * hidden**0.5, "model.norm.weight": draw(hidden)}
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = draw(config["vocab_size"], hidden)
    for number in range(config["num_hidden_layers"]):
        shapes = {
            "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (num_q * wide, hidden), "self_attn.k_proj.weight": (num_kv * wide, hidden),
            "self_attn.v_proj.weight": (num_kv * wide, hidden), "self_attn.o_proj.weight": (hidden, num_q * wide),
            "self_attn.q_norm.weight": (wide,), "self_attn.k_norm.weight": (wide,),
            "self_attn.sa_indexer.q_proj.weight": (num_j * index + num_j, hidden),
            "self_attn.sa_indexer.k_proj.weight": (index, hidden), "self_attn.sa_indexer.q_norm.weight": (index,),
            "self_attn.sa_indexer.k_norm.weight": (index,), "self_attn.sa_indexer.k_norm.bias": (index,),
            "mlp.gate.weight": (num_experts, hidden), "mlp.experts.gate_up_proj": (num_experts, hidden, 2 * narrow),
            "mlp.experts.down_proj": (num_experts, narrow, hidden),
        }  # fmt: skip
        weights |= {f"model.layers.{number}.{name}": draw(*shape) for name, shape in shapes.items()}
    vision = config.get("vision_config")
    if vision is None:
        return weights
    d, inner, merged = vision["hidden_size"], vision["intermediate_size"], 4 * vision["hidden_size"]
    tower = "visual.vision_model"
    weights[f"{tower}.embeddings.patch_embedding.weight"] = draw(d, 588).view(d, 3, 14, 14)
    weights[f"{tower}.embeddings.patch_embedding.bias"] = draw(d)
    weights[f"{tower}.embeddings.position_embedding.weight"] = draw((vision["image_size"] // 14) ** 2, d) * 3
    weights[f"{tower}.embeddings.packing_position_embedding.weight"] = draw(100, d).bfloat16()
    linears = [(f"{tower}.post_layernorm", d, 0), ("mlp_AR.pre_norm", merged, 0)]
    linears += [("mlp_AR.linear_1", merged, merged), ("mlp_AR.linear_2", hidden, merged)]
    for number in range(vision["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{number}"
        linears += [(f"{layer}.layer_norm1", d, 0), (f"{layer}.layer_norm2", d, 0)]
        linears += [(f"{layer}.self_attn.{name}_proj", d, d) for name in ("q", "k", "v", "out")]
        linears += [(f"{layer}.mlp.fc1", inner, d), (f"{layer}.mlp.fc2", d, inner)]
    for name, rows, columns in linears:
        weights[f"{name}.weight"] = draw(rows, columns) if columns else draw(rows)
        weights[f"{name}.bias"] = draw(rows) - 1
    return weights


def rms(x, weight, eps):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(x, angles):
    """x [T, heads, D], angles [T, D / 2]: pairs (i, i + D / 2) turn as complex numbers."""
    half = x.shape[-1] // 2
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def frequencies(width: int, theta: float):
    return 1.0 / theta ** (torch.arange(0, width, 2).float() / width)


def section_angles(position_ids, sections, theta):
    of_frequency = frequencies(2 * sum(sections), theta)
    axes = [axis for axis, count in enumerate(sections) for _ in range(count)]
    columns = [position_ids[axis].float() * of_frequency[i] for i, axis in enumerate(axes)]
    return torch.stack(columns, dim=1).to(torch.get_default_dtype())


def linear(weights, name, x):
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def layer_norm(weights, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def encode_picture(config, weights, pixels, height, width):
    """[height * width, 3, 14, 14] -> [merged tokens, hidden]."""
    vision, tower = config["vision_config"], "visual.vision_model"
    d, heads = vision["hidden_size"], vision["num_attention_heads"]
    side = vision["image_size"] // 14
    x = F.conv2d(pixels, *(weights[f"{tower}.embeddings.patch_embedding.{part}"] for part in ("weight", "bias"))).flatten(1)
    table = weights[f"{tower}.embeddings.position_embedding.weight"].view(side, side, d)
    x = x + F.interpolate(table.permute(2, 0, 1)[None], (height, width), mode="bilinear")[0].permute(1, 2, 0).reshape(-1, d)
    row, column = (torch.arange(height * width) // width).float(), (torch.arange(height * width) % width).float()
    of_frequency = frequencies(d // heads // 2, 10000.0)
    angles = torch.cat([row[:, None] * of_frequency, column[:, None] * of_frequency], dim=1).to(x.dtype)
    for number in range(vision["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{number}"
        normed = layer_norm(weights, f"{layer}.layer_norm1", x, 1e-6)
        q, k, v = (linear(weights, f"{layer}.self_attn.{name}_proj", normed).view(len(x), heads, -1) for name in "qkv")
        q, k, v = (y.transpose(0, 1) for y in (rotate(q, angles), rotate(k, angles), v))
        mixed = ((q @ k.transpose(1, 2)) * (d // heads) ** -0.5).softmax(-1) @ v
        x = x + linear(weights, f"{layer}.self_attn.out_proj", mixed.transpose(0, 1).reshape(len(x), d))
        inner = F.gelu(
            linear(weights, f"{layer}.mlp.fc1", layer_norm(weights, f"{layer}.layer_norm2", x, 1e-6)), approximate="tanh"
        )
        x = x + linear(weights, f"{layer}.mlp.fc2", inner)
    grid = layer_norm(weights, f"{tower}.post_layernorm", x, 1e-6).view(height, width, d)
    merged = torch.cat([grid[0::2, 0::2], grid[0::2, 1::2], grid[1::2, 0::2], grid[1::2, 1::2]], dim=-1).view(-1, 4 * d)
    inner = F.gelu(linear(weights, "mlp_AR.linear_1", layer_norm(weights, "mlp_AR.pre_norm", merged, 1e-5)))
    return linear(weights, "mlp_AR.linear_2", inner)


def select(config, weights, layer, normed, position_ids):
    """The mask [T, T] of one layer."""
    num_tokens, theta = len(normed), config["rope_theta"]
    sparse = config["sa_config"]
    heads, width, k = sparse["indexer_num_heads"], sparse["indexer_head_dim"], sparse["topk"]
    sections = [section * width // config["head_dim"] for section in config["rope_scaling"]["mrope_section"]]
    angles = section_angles(position_ids, sections, theta)
    projected = linear(weights, f"{layer}.q_proj", normed)
    q = projected[:, : heads * width].view(num_tokens, heads, width)
    gates = projected[:, heads * width :] * width**-0.5
    q = rotate(rms(q, weights[f"{layer}.q_norm.weight"], 1e-6), angles)
    key = layer_norm(weights, f"{layer}.k_norm", linear(weights, f"{layer}.k_proj", normed), 1e-6)
    key = rotate(key[:, None], angles)[:, 0]
    # The Hadamard transform is orthonormal and so cancels here.
    scores = torch.einsum("tj,tjs->ts", gates, torch.einsum("tji,si->tjs", q, key).relu())
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for t in range(num_tokens):
        # A stable sort keeps the smaller position first among equals.
        best = scores[t, : t + 1].sort(descending=True, stable=True).indices[:k]
        mask[t, best] = True
    return mask


def run_naive(config, weights, input_ids, position_ids, image_embeds=None, video_embeds=None):
    """logits [T, V] and selected [layers, T, T]."""
    x = weights["model.embed_tokens.weight"][input_ids]
    for token, vectors in ((config["image_token_id"], image_embeds), (config["video_token_id"], video_embeds)):
        if vectors is not None:
            x[input_ids == token] = vectors
    eps, wide = config["rms_norm_eps"], config["head_dim"]
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    angles = section_angles(position_ids, config["rope_scaling"]["mrope_section"], config["rope_theta"])
    masks = []
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        normed = rms(x, weights[f"{layer}.input_layernorm.weight"], eps)
        q, k, v = (linear(weights, f"{layer}.self_attn.{name}_proj", normed).view(len(x), -1, wide) for name in "qkv")
        q = rotate(rms(q, weights[f"{layer}.self_attn.q_norm.weight"], eps), angles).transpose(0, 1)
        k = rotate(rms(k, weights[f"{layer}.self_attn.k_norm.weight"], eps), angles).transpose(0, 1)
        k, v = k.repeat_interleave(group, dim=0), v.transpose(0, 1).repeat_interleave(group, dim=0)
        masks.append(select(config, weights, f"{layer}.self_attn.sa_indexer", normed, position_ids))
        scores = ((q @ k.transpose(1, 2)) * wide**-0.5).masked_fill(~masks[-1], -torch.inf)
        x = x + linear(weights, f"{layer}.self_attn.o_proj", (scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        normed = rms(x, weights[f"{layer}.post_attention_layernorm.weight"], eps)
        best = linear(weights, f"{layer}.mlp.gate", normed).softmax(-1).topk(config["num_experts_per_tok"], dim=-1)
        share = best.values / best.values.sum(-1, keepdim=True) if config["norm_topk_prob"] else best.values
        mixed = torch.zeros_like(x)
        for slot in range(config["num_experts_per_tok"]):
            chosen = best.indices[:, slot]
            gate_up, down = (weights[f"{layer}.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
            for expert in chosen.unique():
                rows = (chosen == expert).nonzero()[:, 0]
                gate, up = (normed[rows] @ gate_up[expert]).chunk(2, dim=-1)
                mixed[rows] += share[rows, slot, None] * ((F.silu(gate) * up) @ down[expert])
        x = x + mixed
    head = weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return rms(x, weights["model.norm.weight"], eps) @ head.T, torch.stack(masks)


def lay_out(config: dict, parts: list[tuple], seed: int = 0):
    """A prompt of ("text", n), ("image", h, w) and ("video", h, w) parts, sizes in patches: ids, positions, grids by kind."""
    generator = torch.Generator().manual_seed(seed)
    ids, positions, grids, following = [], [], {"image": [], "video": []}, 0
    for kind, *size in parts:
        if kind == "text":
            ids += torch.randint(0, 50, (size[0],), generator=generator).tolist()
            positions += [(following + i,) * 3 for i in range(size[0])]
            following += size[0]
            continue
        rows, columns = size[0] // 2, size[1] // 2
        grids[kind].append([1, *size])
        ids += [config[f"{kind}_token_id"]] * (rows * columns)
        positions += [(following, following + r, following + c) for r in range(rows) for c in range(columns)]
        following += max(rows, columns)
    return torch.tensor(ids), torch.tensor(positions).T.contiguous(), grids


def write_checkpoint(folder: Path, config: dict, weights: dict[str, torch.Tensor]) -> Path:
    """A model folder of the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def record_case(folder: Path, config: dict, parts: list[tuple], seed: int = 0) -> Path:
    """Write a random checkpoint and what the naive network makes of a prompt; returns the path of the case."""
    weights = make_weights(config, seed)
    write_checkpoint(folder, config, weights)
    ids, positions, grids = lay_out(config, parts, seed)
    case = {"input_ids": ids, "position_ids": positions, "rope_delta": positions.max()[None] + 1 - len(ids)}
    generator = torch.Generator().manual_seed(seed + 1)
    embeds = {}
    with torch.inference_mode():
        for kind, rows in grids.items():
            if not rows:
                continue
            pictures = [torch.rand(h * w, 3, 14, 14, generator=generator) * 2 - 1 for _, h, w in rows]
            embeds[f"{kind}_embeds"] = torch.cat(
                [encode_picture(config, weights, one, h, w) for one, (_, h, w) in zip(pictures, rows, strict=True)]
            )
            case |= {f"{kind}_pixels": torch.cat(pictures), f"{kind}_grid_thw": torch.tensor(rows)}
        logits, selected = run_naive(config, weights, ids, positions, **embeds)
    case |= embeds | {"logits": logits, "selected": selected.to(torch.uint8)}
    save_file({name: tensor.contiguous() for name, tensor in case.items()}, folder / "case.safetensors")
    return folder / "case.safetensors"
