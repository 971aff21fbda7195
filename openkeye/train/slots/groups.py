"""Which parameter learns by which rule and at which rate."""

from torch import nn

from openkeye.model.keye import KeyeModel
from openkeye.train.slots.config import TrainConfig
from openkeye.train.slots.optimizer import ParameterGroup

EMBEDDING_NAMES = ("embed_tokens", "lm_head", "patch_embedding", "position_embedding")


def parameter_groups(model: KeyeModel, heads: nn.Module, config: TrainConfig) -> list[ParameterGroup]:
    """Muon for the trunk's matrices; AdamW for embeddings, norms, biases, routers and the cell head; the indexer apart.

    Routers stay with AdamW: an orthogonalised update moves all experts' logits equally far, however small their gradient.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    indexer: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if "sa_indexer" in name:
            indexer.append(parameter)
        elif parameter.ndim >= 2 and not any(part in name for part in EMBEDDING_NAMES) and not name.endswith("mlp.gate.weight"):
            matrices.append(parameter)
        else:
            others.append(parameter)
    return [
        ParameterGroup("trunk", "muon", matrices, config.muon_rate, config.weight_decay),
        ParameterGroup("rest", "adamw", [*others, *heads.parameters()], config.adamw_rate),
        ParameterGroup("indexer", "adamw", indexer, config.indexer_rate),
    ]
