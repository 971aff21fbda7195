"""The losses of a slot batch, each a pure function of tensors."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openkeye.data.slots.slot_batch import NO_LABEL


@dataclass(frozen=True)
class AnswerLoss:
    """Cross entropy of the answers, and how many slots were answered exactly under teacher forcing."""

    loss: Tensor
    num_exact_by_task: Tensor
    # [tasks]
    num_slots_by_task: Tensor
    # [tasks]


def answer_loss(
    logits_NV: Tensor, targets_N: Tensor, slots_N: Tensor, tasks_of_slots: Tensor, task_weights: Tensor
) -> AnswerLoss:
    """Mean cross entropy per task over its answer tokens, weighted, summed over tasks and divided by the weights' sum.

    Args:
        logits_NV: [n, V] at the positions that predict an answer token.
        targets_N: [n] the tokens to predict; NO_LABEL pads the list and counts for nothing.
        slots_N: [n] which slot of the batch each belongs to.
        tasks_of_slots: [slots] task of each slot.
        task_weights: [tasks] float32.

    Teacher-forced exactness equals greedy exactness: greedy decoding takes the same tokens as long as every argmax is right.
    """
    num_tasks = task_weights.shape[0]
    tasks_N = tasks_of_slots[slots_N]
    token_loss = F.cross_entropy(logits_NV.float(), targets_N, ignore_index=NO_LABEL, reduction="none")
    is_label = (targets_N != NO_LABEL).float()
    sums = token_loss.new_zeros(num_tasks).index_add(0, tasks_N, token_loss)
    counts = token_loss.new_zeros(num_tasks).index_add(0, tasks_N, is_label)
    weights = task_weights * (counts > 0)
    loss = (weights * sums / counts.clamp_min(1)).sum() / weights.sum().clamp_min(1e-6)
    with torch.no_grad():
        wrong = (logits_NV.argmax(dim=-1) != targets_N).float() * is_label
        num_wrong = wrong.new_zeros(tasks_of_slots.shape[0]).index_add(0, slots_N, wrong)
        ones = torch.ones_like(num_wrong)
        num_slots = wrong.new_zeros(num_tasks).index_add(0, tasks_of_slots, ones)
        num_exact = wrong.new_zeros(num_tasks).index_add(0, tasks_of_slots, (num_wrong == 0).float())
    return AnswerLoss(loss, num_exact, num_slots)


def balance_loss(router_logits: list[Tensor], num_experts_per_token: int) -> Tensor:
    """E * sum_e (share of tokens sent to e) * (mean probability of e), mean over layers: 1 where the load is even.

    Switch Transformer eq. 4, with the share divided by the number of experts per token.
    """
    terms = []
    for logits_TE in router_logits:
        probability_TE = logits_TE.float().softmax(dim=-1)
        chosen = probability_TE.topk(num_experts_per_token, dim=-1).indices
        share = torch.zeros_like(probability_TE).scatter_(1, chosen, 1.0).mean(dim=0) / num_experts_per_token
        terms.append(logits_TE.shape[-1] * (share * probability_TE.mean(dim=0)).sum())
    return torch.stack(terms).mean()
