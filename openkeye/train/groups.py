"""Which parameter belongs to which part, learns by which rule, and whether it decays."""

from dataclasses import dataclass

from torch import nn

EMBEDDING_NAMES = ("embed_tokens", "lm_head", "patch_embedding", "position_embedding")
INDEXER_ADAMW_SHARE = 0.1
# of the rate, for gates and norms of an indexer whose matrices Muon steps: queries and keys are normed behind their
# projections, so that these take longer steps than anything else


@dataclass(frozen=True)
class TrainedParameter:
    """One parameter that learns in this stage."""

    name: str
    # as in the checkpoint
    parameter: nn.Parameter
    part: str
    # of `config.PARTS`; it has the rate
    rule: str
    # "adamw" or "muon"
    decays: bool
    num_adamw_rows: int = 0
    # the last of a matrix whose other rows Muon steps: an indexer's gates
    adamw_share: float = 1.0
    # of the part's rate, where AdamW steps


def part_of(name: str) -> str:
    """The part of a published parameter name."""
    if ".sa_indexer." in name:
        return "indexer"
    if name.startswith("visual."):
        return "vision"
    return "projector" if name.startswith("mlp_AR.") else "decoder"


def trained_parameters(
    model: nn.Module, trains: tuple[str, ...], optimizer: str, indexer_optimizer: str = "adamw"
) -> list[TrainedParameter]:
    """Lets the named parts of a `KeyeModel` learn and freezes the others; those that learn, in the model's order.

    Muon is for matrices and stacks of experts, of the trunk (optimizer) and of the indexer (indexer_optimizer). Embeddings,
    norms, biases, routers and an indexer's gates, rows of its query matrix, stay with AdamW (an orthogonalised update moves all
    experts' logits equally far, however small their gradient) and do not decay; neither does the indexer.
    """
    trained = []
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in trains)
        if part not in trains:
            continue
        is_matrix = parameter.ndim >= 2 and not any(one in name for one in EMBEDDING_NAMES)
        if part == "indexer":
            rule = indexer_optimizer if is_matrix else "adamw"
            has_gates = rule == "muon" and name.endswith(".q_proj.weight")
            num_gates = model.get_submodule(name.removesuffix(".q_proj.weight")).num_heads if has_gates else 0
            assert isinstance(num_gates, int)
            share = INDEXER_ADAMW_SHARE if indexer_optimizer == "muon" else 1.0
            trained.append(TrainedParameter(name, parameter, part, rule, False, num_gates, share))
        else:
            is_trunk = is_matrix and not name.endswith("mlp.gate.weight")
            trained.append(TrainedParameter(name, parameter, part, optimizer if is_trunk else "adamw", is_trunk))
    return trained
