"""Which parameter belongs to which part, learns by which rule, and whether it decays."""

from dataclasses import dataclass

from torch import nn

EMBEDDING_NAMES = ("embed_tokens", "lm_head", "patch_embedding", "position_embedding")


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


def part_of(name: str) -> str:
    """The part of a published parameter name."""
    if ".sa_indexer." in name:
        return "indexer"
    if name.startswith("visual."):
        return "vision"
    return "projector" if name.startswith("mlp_AR.") else "decoder"


def trained_parameters(model: nn.Module, trains: tuple[str, ...], optimizer: str) -> list[TrainedParameter]:
    """Lets the named parts of a `KeyeModel` learn and freezes the others; those that learn, in the model's order.

    Muon is for the trunk's matrices and stacks of experts. Embeddings, norms, biases and routers stay with AdamW (an
    orthogonalised update moves all experts' logits equally far, however small their gradient) and do not decay; neither does
    the indexer, whose gates are rows of its matrix.
    """
    trained = []
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in trains)
        if part not in trains:
            continue
        is_matrix = parameter.ndim >= 2 and not any(one in name for one in EMBEDDING_NAMES)
        is_trunk = is_matrix and part != "indexer" and not name.endswith("mlp.gate.weight")
        trained.append(TrainedParameter(name, parameter, part, optimizer if is_trunk else "adamw", is_trunk))
    return trained
