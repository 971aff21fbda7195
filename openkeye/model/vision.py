"""The vision tower: SigLIP-400M at native resolution, positions interpolated, 2-D rotary, full attention inside each picture.

Letters: N pictures of one size, P patches of a picture, D width, H heads.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from openkeye.inputs.patches import Patches
from openkeye.kernels.dispatch import apply_rotary
from openkeye.model.config import VisionConfig
from openkeye.model.rotary import grid_table

MAX_SMALL_PATCHES = 1024
# of a picture: up to here attention is a small part of the tower's work
SMALL_BACK_ENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
BACK_ENDS = [SDPBackend.CUDNN_ATTENTION, *SMALL_BACK_ENDS]


class VisionEmbeddings(nn.Module):
    """Patches to vectors, plus the learned position table stretched to the picture's grid."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.base_grid = config.base_grid
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.base_grid**2, config.hidden_size)

    def forward(self, pixels_NPCHW: Tensor, height: int, width: int) -> Tensor:
        """[N, P, 3, p, p] -> [N, P, D]."""
        weight = self.patch_embedding.weight
        # A patch is as large as the kernel, so the convolution is one matrix product.
        embeds = F.linear(pixels_NPCHW.flatten(2).to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)
        return embeds + self.positions(height, width)

    def positions(self, height: int, width: int) -> Tensor:
        """[height * width, D]: bilinear, half-pixel centres, no antialiasing."""
        table = self.position_embedding.weight.unflatten(0, (self.base_grid, self.base_grid)).permute(2, 0, 1)
        stretched = F.interpolate(table[None], size=(height, width), mode="bilinear", align_corners=False)
        return stretched[0].flatten(1).t()


class VisionAttention(nn.Module):
    """Full attention inside one picture, rotated by row and column."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_NPD: Tensor, cos_PD: Tensor, sin_PD: Tensor) -> Tensor:
        """[N, P, D] -> [N, P, D]."""
        query, key, value = (
            projection(x_NPD).unflatten(-1, (self.num_heads, -1)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary(query, cos_PD, sin_PD), apply_rotary(key, cos_PD, sin_PD)
        # cuDNN plans anew for every number of pictures, tens of milliseconds on the host: more than small pictures take.
        with sdpa_kernel(SMALL_BACK_ENDS if x_NPD.shape[1] <= MAX_SMALL_PATCHES else BACK_ENDS):
            output = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return self.out_proj(output.transpose(1, 2).flatten(2))


class VisionMlp(nn.Module):
    """Two linear layers around a tanh GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMlp(config)

    def forward(self, x_NPD: Tensor, cos_PD: Tensor, sin_PD: Tensor) -> Tensor:
        """[N, P, D] -> [N, P, D]."""
        x_NPD = x_NPD + self.self_attn(self.layer_norm1(x_NPD), cos_PD, sin_PD)
        return x_NPD + self.mlp(self.layer_norm2(x_NPD))


class VisionEncoder(nn.Module):
    """The stack of layers, under the published name `encoder`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class VisionModel(nn.Module):
    """Embeddings, encoder, final norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels_NPCHW: Tensor, height: int, width: int) -> Tensor:
        """N pictures of one size, [N, P, 3, p, p] with P = height * width -> [N, P, D]."""
        cos, sin = grid_table(height, width, self.config.head_dim, self.config.rope_theta, pixels_NPCHW.device)
        x = self.embeddings(pixels_NPCHW, height, width)
        for layer in self.encoder.layers:
            x = layer(x, cos, sin)
        return self.post_layernorm(x)


class VisionTower(nn.Module):
    """The published name `visual.vision_model`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.vision_model = VisionModel(config)


def same_size_runs(patches: Patches) -> list[tuple[int, int, int, int]]:
    """Runs of neighbouring pictures with one grid: (first picture, end, height, width)."""
    grids = patches.grid_thw.tolist()
    runs: list[tuple[int, int, int, int]] = []
    for number, (_, height, width) in enumerate(grids):
        if runs and runs[-1][2:] == (height, width):
            runs[-1] = (runs[-1][0], number + 1, height, width)
        else:
            runs.append((number, number + 1, height, width))
    assert all(time == 1 for time, _, _ in grids), "one grid row per picture or frame"
    return runs
