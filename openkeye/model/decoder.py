"""The decoder: embeddings, layers of attention and experts (or one dense MLP), final norm."""

from torch import Tensor, nn

from openkeye.kernels.dispatch import add_rms_norm
from openkeye.model.attention import Attention, RotaryTables
from openkeye.model.config import KeyeConfig
from openkeye.model.experts import DenseMlp, MixtureOfExperts
from openkeye.model.norm import RmsNorm
from openkeye.model.past import CachedPast, IndexerOutput, Past
from openkeye.model.rotary import mrope_table


class DecoderLayer(nn.Module):
    """Pre-norm attention, pre-norm experts or dense MLP."""

    def __init__(self, config: KeyeConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config) if config.num_experts else DenseMlp(config)

    def begin(
        self, x_TD: Tensor, rotary: RotaryTables, needs_index: bool
    ) -> tuple[Tensor, Tensor, Tensor, IndexerOutput | None]:
        """Everything before attention; training compiles this and `finish` apart from the past between them."""
        return self.self_attn.project(self.input_layernorm(x_TD), rotary, needs_index)

    def finish(self, x_TD: Tensor, attended_THD: Tensor) -> Tensor:
        """Everything after attention."""
        norm = self.post_attention_layernorm
        x_TD, hidden_TD = add_rms_norm(x_TD, self.self_attn(attended_THD), norm.weight, norm.eps)
        return x_TD + self.mlp(hidden_TD)

    def forward(self, x_TD: Tensor, rotary: RotaryTables, past: Past | CachedPast) -> Tensor:
        """[T, D] -> [T, D]."""
        if isinstance(past, CachedPast):
            query, cached = self.self_attn.write(self.input_layernorm(x_TD), rotary, self.layer_index, past)
            return self.finish(x_TD, past.attend(self.layer_index, query, cached))
        query, key, value, index = self.begin(x_TD, rotary, past.needs_index)
        return self.finish(x_TD, past.attend(self.layer_index, query, key, value, index))


class Decoder(nn.Module):
    """The published name `model`."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, number) for number in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embeds_TD: Tensor, position_ids_3T: Tensor, past: Past | CachedPast) -> Tensor:
        """[T, D] -> final normalised hidden states [T, D]."""
        rotary = RotaryTables(
            *mrope_table(position_ids_3T, self.config.mrope_section, self.config.rope_theta, self.config.rope_scaling),
            *mrope_table(position_ids_3T, self.config.index_mrope_section, self.config.rope_theta, self.config.rope_scaling),
        )
        for layer in self.layers:
            embeds_TD = layer(embeds_TD, rotary, past)
        return self.norm(embeds_TD)
