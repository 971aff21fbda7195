"""What a text model loses by selecting: perplexity, the indexer's recall, and needles in real text.

Documents go through the network together and are scored where they lie; nothing walks token by token.

Letters: T tokens, N tokens of branches, V vocabulary, D hidden width, L layers, B documents, C choices of top-k.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.inputs.processor import Processor
from openkeye.kernels.dispatch import cross_entropy
from openkeye.kernels.reference_learning import TokenLosses
from openkeye.model.keye import KeyeModel
from openkeye.model.measuring_past import MeasuringPast

NUM_DISTRACTORS = 9
QUESTION = "What is the magic number of {city}?"
FACT = " The magic number of {city} is {number}. "
ANSWER = "The magic number of {city} is"
CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Hanoi", "Quito", "Dublin", "Vienna", "Nairobi", "Seoul")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Mode:
    """One way of attending."""

    attention: str
    # of `measuring_past.MODES`
    top_k: int = 0

    def __str__(self) -> str:
        return self.attention if self.attention == "dense" else f"{self.attention} {self.top_k}"


@dataclass(frozen=True)
class SelectionFigures:
    """What the indexer selects beside attention's own choice, on the dense walk, over queries that see more than k keys."""

    recall_LCB: np.ndarray
    # share of attention's top k (head-summed) that the indexer's top k holds
    mass_LCB: np.ndarray
    # of attention's probability
    best_mass_LCB: np.ndarray
    # of attention's own top k


@dataclass(frozen=True)
class Needle:
    """A document with a fact in it, a question, and answers of which the first is right."""

    ids: Tensor
    # [T] up to and with the beginning of the answer
    answers: tuple[tuple[int, ...], ...]
    # tokens that go on
    depth: float


def cut_documents(texts: Sequence[str], processor: Processor, context: int, num_documents: int) -> Tensor:
    """[B, context] token ids: windows of the texts that do not overlap, evenly spread over all of them.

    Raises:
        InputError: not one window can be filled.
    """
    windows = []
    for text in texts:
        ids = processor.encode_text(text)
        windows += [ids[start : start + context] for start in range(0, len(ids) - context + 1, context)]
    if not windows:
        raise InputError(f"the files hold no {context:,} tokens in a row; give longer files or a smaller --context")
    places = np.linspace(0, len(windows) - 1, min(num_documents, len(windows))).round().astype(int)
    return torch.tensor([windows[place] for place in places])


@torch.inference_mode()
def token_losses(model: KeyeModel, ids_BT: Tensor, mode: Mode, max_tokens: int = 32768) -> np.ndarray:
    """Negative logarithms of the probability of every token but the first, [B, T - 1] in float32.

    max_tokens: that go through the network together, whole documents.
    """
    length, rows = ids_BT.shape[1], []
    for part in ids_BT.split(max(1, max_tokens // length)):
        hidden_TD = _walk(model, part, MeasuringPast(length, mode.attention, mode.top_k))
        labels = part.roll(-1, dims=1)
        labels[:, -1] = -1
        losses = cross_entropy(hidden_TD, _head(model), labels.flatten().to(hidden_TD.device)).loss_T
        rows.append(losses.unflatten(0, part.shape)[:, :-1].float().cpu())
    return torch.cat(rows).numpy()


@torch.inference_mode()
def selection_figures(model: KeyeModel, ids_BT: Tensor, choices: Sequence[int]) -> SelectionFigures:
    """Recall and mass of each layer, for these k below the documents' length."""
    found = []
    for ids_T in ids_BT:
        past = MeasuringPast(ids_BT.shape[1], measured=tuple(choices))
        _walk(model, ids_T[None], past)
        found.append(torch.stack([torch.cat(past.results[layer]) for layer in sorted(past.results)]))
    recall, mass, best = torch.stack(found, dim=2).float().cpu().numpy().transpose(3, 0, 1, 2)
    return SelectionFigures(recall, mass, best)


def make_needles(texts: Sequence[str], processor: Processor, length: int, num_per_depth: int, seed: int) -> Iterator[Needle]:
    """Questions about a number in real text, at every depth, as the model's chat template puts them.

    Raises:
        InputError: the texts are shorter than that.
    """
    generator = random.Random(seed * 1_000_003 + length)
    streams = [ids for text in texts if len(ids := processor.encode_text(text)) >= length]
    if not streams:
        raise InputError(f"no file holds {length:,} tokens; give longer files or smaller --lengths")
    for depth in DEPTHS:
        for _ in range(num_per_depth):
            city = generator.choice(CITIES)
            numbers = generator.sample(range(10_000, 100_000), 1 + NUM_DISTRACTORS)
            fact = processor.encode_text(FACT.format(city=city, number=numbers[0]))
            frame = processor.template.render([{"role": "user", "content": "\ufffc\n\n" + QUESTION.format(city=city)}])
            before, _, after = "".join(text for text, _ in frame).partition("\ufffc")
            opening, closing = (processor.tokenizer.encode_template(text) for text in (before, after))
            closing = closing + processor.encode_text(ANSWER.format(city=city))
            num_text = length - len(opening) - len(fact) - len(closing) - 8
            # room for the answer
            if num_text < 1:
                raise InputError(f"--lengths: {length} tokens hold no text beside the question; give more")
            stream = generator.choice(streams)
            start = generator.randrange(len(stream) - num_text + 1)
            hay, place = stream[start : start + num_text], int(depth * num_text)
            ids = opening + hay[:place] + fact + hay[place:] + closing
            answers = tuple(tuple(processor.encode_text(f" {number}")) for number in numbers)
            yield Needle(torch.tensor(ids), answers, depth)


@torch.inference_mode()
def ask_needle(model: KeyeModel, needle: Needle, mode: Mode) -> tuple[bool, bool]:
    """(the right number is the likeliest of all, greedy decoding writes it), in one pass: every answer is a branch."""
    length, device = needle.ids.shape[0], model.model.embed_tokens.weight.device
    # The last token of the prompt is where answers begin: it is the first token of every branch.
    tails = [(int(needle.ids[-1]), *answer[:-1]) for answer in needle.answers]
    branches = torch.tensor([number for number, tail in enumerate(tails) for _ in tail], device=device)
    places = torch.tensor([length - 1 + place for tail in tails for place in range(len(tail))])
    ids = torch.cat([needle.ids[:-1], torch.tensor([token for tail in tails for token in tail])])
    positions = torch.cat([torch.arange(length - 1), places])
    past = MeasuringPast(length - 1, mode.attention, mode.top_k, branches_N=branches)
    embeds = model.embed(ids.to(device), None, None)
    hidden_ND = model(embeds, positions.to(device).expand(3, -1), past)[length - 1 :]
    labels = torch.tensor([token for answer in needle.answers for token in answer])
    losses: TokenLosses = cross_entropy(hidden_ND, _head(model), labels.to(device))
    totals = torch.zeros(len(tails), device=device).index_add_(0, branches, losses.loss_T.float())
    is_greedy = (losses.best_T.cpu() == labels)[: len(needle.answers[0])].all()
    return int(totals.argmin()) == 0, bool(is_greedy)


def bootstrap(values_B: np.ndarray, statistic: "np.ufunc | None" = None, num_draws: int = 1000) -> tuple[float, float]:
    """95% interval of the mean (of `statistic` of the mean) by drawing documents again."""
    generator = np.random.default_rng(0)
    means = values_B[generator.integers(len(values_B), size=(num_draws, len(values_B)))].mean(axis=1)
    means = means if statistic is None else statistic(means)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def _walk(model: KeyeModel, ids_BT: Tensor, past: MeasuringPast) -> Tensor:
    """Hidden states of documents that each begin at position 0, [B * T, D]."""
    device = model.model.embed_tokens.weight.device
    positions = torch.arange(ids_BT.shape[1], device=device).repeat(ids_BT.shape[0])
    return model(model.embed(ids_BT.flatten().to(device), None, None), positions.expand(3, -1), past)


def _head(model: KeyeModel) -> Tensor:
    """[V, D]"""
    return model.model.embed_tokens.weight if model.config.tie_word_embeddings else model.lm_head.weight
