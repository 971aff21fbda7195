"""`LearnerPack`: rollouts with what their tokens count for, laid out as the network reads them in one pass.

Rollouts of one prompt share a document: the prompt without its last token is the trunk, and each rollout a branch that begins
with that token, which has the rollout's first token to predict. So the prompt, with its pictures, is computed once.

Letters: T tokens of the pack, n learnt ones, S rollouts, L layers, K experts a token, tokens of a support or selected keys; P
tokens of a rollout's prompt, N tokens whose selected keys the engine has told.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.common.device import upload
from openkeye.data.document import Document
from openkeye.data.packed_batch import PackedBatch, pack
from openkeye.data.packing import DocumentCost, best_fit
from openkeye.rl.policy_loss import PolicyTokens
from openkeye.rl.rollout import Rollout, TokenStreams


@dataclass(frozen=True)
class LearnerSample:
    """One rollout to learn from."""

    document: Document
    # the rollout's ids with their positions and pictures, as they were sampled; what is learnt the streams say
    rollout: Rollout
    streams: TokenStreams

    def __post_init__(self) -> None:
        rollout, streams, ids = self.rollout, self.streams, self.document.input_ids.numpy()
        expected = np.concatenate([rollout.prompt_ids, rollout.output_ids])
        if self.document.branches or not np.array_equal(ids, expected):
            raise ValueError(f"{rollout.id}: its document must hold the rollout's {len(expected)} ids, and no branches")
        if not len(rollout.prompt_ids):
            raise ValueError(f"{rollout.id}: a rollout without a prompt has nothing that predicts its first token")
        kinds = (streams.advantages, streams.rl_weights, streams.ce_weights, streams.ref_kl_weights)
        others = (streams.ref_logprobs, streams.support_ids, streams.support_logprobs)
        if any(len(stream) != len(rollout.output_ids) for stream in (*kinds, *(one for one in others if one is not None))):
            raise ValueError(f"{rollout.id}: every stream needs a value for each of {len(rollout.output_ids)} tokens")
        if bool((streams.rl_weights[~rollout.is_policy] != 0).any()):
            raise ValueError(f"{rollout.id}: the policy loss weighs tokens that the policy did not sample")
        has_reference = streams.ref_logprobs is not None or streams.support_logprobs is not None
        if bool((streams.ref_kl_weights != 0).any()) and not has_reference:
            raise ValueError(f"{rollout.id}: ref_kl_weights need the reference's log-probabilities")

    @property
    def num_prompt(self) -> int:
        return len(self.rollout.prompt_ids)

    @property
    def is_learnt(self) -> np.ndarray:
        """[number of output tokens] bool: those with a log-probability, sampled ones and whatever has a weight."""
        streams = self.streams
        return self.rollout.is_policy | (streams.ce_weights != 0) | (streams.ref_kl_weights != 0)


@dataclass(frozen=True)
class JoinedDocument:
    """A document of one rollout, or of several behind one prompt."""

    document: Document
    members: tuple[LearnerSample, ...]
    predictors: tuple[int, ...]
    # of each member: the token of the document that predicts its first output token


@dataclass(frozen=True)
class LearnerPack:
    """One pass of the network; tensors lie on one device."""

    batch: PackedBatch
    members: tuple[LearnerSample, ...]
    tokens: PolicyTokens
    # with `proximal` and `logprobs` still those of sampling
    is_policy: Tensor
    # [n] bool: sampled by the policy
    routes: Tensor | None
    # [L, T, K] int16, see `reference_learning.route_as`; None: all are routed live
    support_ids: Tensor | None
    # [n, K] int64, -1 where unused
    support_logprobs: Tensor | None
    # [n, K] float32
    has_support: Tensor
    # [S] bool: rollouts whose streams have a support, if an empty one at some tokens
    num_policy: int
    # tokens that the policy sampled
    num_rl: int
    # tokens of the policy loss
    num_supported: int
    # tokens of these with a weight of their divergence
    num_replayed: tuple[int, int]
    # pairs of token and layer, and tokens, whose experts are replayed
    pick_rows: Tensor | None = None
    # [N] int64: the tokens whose selected keys are to be compared; None: no rollout tells any
    picks: Tensor | None = None
    # [L, N, K] int32: their keys as tokens of the pack, -1 where there are fewer
    num_picks: int = 0
    # of these, without -1
    has_proximal: bool = False
    vectors: Tensor | None = None
    # [M, D] of the pictures, where they were computed before and nothing trains them

    def to(self, device: torch.device) -> "LearnerPack":
        """The same on a device, before it has vectors."""
        streams = {name: upload(value, device) for name, value in vars(self.tokens).items() if isinstance(value, Tensor)}
        own = {name: upload(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        tokens = PolicyTokens(**vars(self.tokens) | streams)
        return LearnerPack(**vars(self) | own | {"batch": self.batch.to(device), "tokens": tokens})


def join_groups(samples: Sequence[LearnerSample], max_tokens: int, joins: bool = True) -> list[JoinedDocument]:
    """Samples as documents of at most max_tokens; those of one group and prompt that follow one another share one.

    Raises:
        InputError: a rollout alone is longer.
    """
    for sample in samples:
        if sample.document.num_tokens > max_tokens:
            raise InputError(
                f"{sample.rollout.id} has {sample.document.num_tokens} tokens; a pack holds {max_tokens}: raise tokens_per_pack"
            )
    if not joins:
        return [_alone(sample) for sample in samples]
    documents = []
    for _, group in groupby(samples, key=_prompt_key):
        waiting: list[LearnerSample] = []
        for sample in group:
            if waiting and _joined_length([*waiting, sample]) > max_tokens:
                documents.append(_joined(waiting))
                waiting = []
            waiting.append(sample)
        documents.append(_joined(waiting))
    return documents


def make_packs(
    documents: Sequence[JoinedDocument], max_tokens: int, top_k: int | None, num_layers: int, experts: tuple[int, int] | None
) -> list[LearnerPack]:
    """Documents in packs of like cost.

    Args:
        top_k: keys that attention selects; None: it is dense.
        experts: (number, picked for a token) where routes are replayed.
    """
    if not documents:
        return []
    lengths = [one.document.num_tokens for one in documents]
    packs = best_fit(lengths, max_tokens, DocumentCost(top_k))
    return [_pack([documents[number] for number in numbers], num_layers, experts) for numbers in packs]


def silent_pack() -> LearnerPack:
    """A pass with nothing to learn, for a rank that has none while others have."""
    nothing = torch.zeros(2, dtype=torch.bool)
    ids = torch.zeros(2, dtype=torch.int64)
    document = Document("nothing", ids, torch.arange(2).expand(3, -1).contiguous(), nothing, nothing)
    return _pack([JoinedDocument(document, (), ())], 0, None)


def groups_of(samples: Sequence[LearnerSample]) -> list[list[LearnerSample]]:
    """Samples that follow one another and are answers to one asking of an example."""
    return [list(group) for _, group in groupby(samples, key=lambda one: _group_key(one.rollout))]


def share_out(rollouts: Sequence[Rollout], num_ranks: int) -> list[list[int]]:
    """Numbers of the rollouts that each rank learns from: whole groups, the largest first to whom has the fewest tokens.

    Every rank that knows all rollouts finds the same, and needs documents of its own alone.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    sizes = [0] * num_ranks
    groups = [list(group) for _, group in groupby(range(len(rollouts)), key=lambda number: _group_key(rollouts[number]))]
    tokens = [sum(len(rollouts[number].prompt_ids) + len(rollouts[number].output_ids) for number in group) for group in groups]
    for place in sorted(range(len(groups)), key=lambda place: -tokens[place]):
        rank = sizes.index(min(sizes))
        shares[rank] += groups[place]
        sizes[rank] += tokens[place]
    return [sorted(share) for share in shares]


def check_routes(routes: np.ndarray, num_layers: int, num_experts: int, num_picked: int, name: str) -> None:
    """Raises ValueError unless every row is -1 throughout or names different experts.

    routes: [tokens, L, K].
    """
    if routes.shape[1:] != (num_layers, num_picked):
        raise ValueError(f"{name}: routes of {list(routes.shape[1:])}; expected [{num_layers}, {num_picked}]")
    ordered = np.sort(routes, axis=-1)
    is_live = (ordered == -1).all(axis=-1)
    is_named = (ordered[..., 0] >= 0) & (ordered[..., -1] < num_experts)
    is_named &= (ordered[..., 1:] != ordered[..., :-1]).all(axis=-1)
    if not (is_live | is_named).all():
        token, layer = np.argwhere(~(is_live | is_named))[0].tolist()
        raise ValueError(
            f"{name}: token {token} was sent to experts {routes[token, layer].tolist()} in layer {layer}; expected "
            f"{num_picked} different ones below {num_experts}, or -1 throughout"
        )


def _group_key(rollout: Rollout) -> tuple[str, int, int]:
    return rollout.id.task, rollout.id.number, rollout.id.group


def _prompt_key(sample: LearnerSample) -> tuple[object, ...]:
    own = sample.rollout.id
    document, num_prompt = sample.document, sample.num_prompt
    # Pictures behind the prompt cannot stand in a branch, and a prompt of one token leaves no trunk.
    if num_prompt < 2 or bool(document.is_media[num_prompt - 1 :].any()):
        return (own, id(sample))
    positions = document.position_ids[:, :num_prompt].numpy().tobytes()
    return (*_group_key(sample.rollout), sample.rollout.prompt_ids.tobytes(), positions)


def _joined_length(members: Sequence[LearnerSample]) -> int:
    first = members[0].num_prompt - 1
    return first + sum(member.document.num_tokens - first for member in members)


def _alone(sample: LearnerSample) -> JoinedDocument:
    return JoinedDocument(_learnt(sample), (sample,), (sample.num_prompt - 1,))


def _learnt(sample: LearnerSample) -> Document:
    before = torch.zeros(sample.num_prompt, dtype=torch.bool)
    return replace(sample.document, is_learnt=torch.cat([before, torch.from_numpy(sample.is_learnt)]))


def _joined(members: Sequence[LearnerSample]) -> JoinedDocument:
    if len(members) == 1:
        return _alone(members[0])
    documents = [_learnt(member) for member in members]
    trunk = members[0].num_prompt - 1
    branches, start = [], trunk
    for document in documents:
        branches.append(start)
        start += document.num_tokens - trunk
    first = documents[0]

    def behind(name: str) -> Tensor:
        parts = [getattr(document, name)[..., trunk:] for document in documents]
        return torch.cat([getattr(first, name)[..., :trunk], *parts], dim=-1)

    names = ("input_ids", "position_ids", "is_learnt", "is_media")
    whole = Document(**vars(first) | {"branches": tuple(branches)} | {name: behind(name) for name in names})
    return JoinedDocument(whole, tuple(members), tuple(branches))


def _pack(documents: Sequence[JoinedDocument], num_layers: int, experts: tuple[int, int] | None) -> LearnerPack:
    batch = pack([one.document for one in documents])
    placed = [
        (member, span.start + predictor)
        for one, span in zip(documents, batch.layout.spans, strict=True)
        for member, predictor in zip(one.members, one.predictors, strict=True)
    ]
    members = tuple(member for member, _ in placed)
    kept = [member.is_learnt for member in members]
    places = [start + np.flatnonzero(mask) for (_, start), mask in zip(placed, kept, strict=True)]
    assert np.array_equal(_joined_rows(places, np.int64), batch.learnt_positions.numpy()), "labels and streams must agree"

    def stream(name: str) -> Tensor:
        values = [getattr(member.streams, name) for member in members]
        filled = [np.zeros(len(mask)) if value is None else value for value, mask in zip(values, kept, strict=True)]
        return torch.from_numpy(_joined_rows([value[mask] for value, mask in zip(filled, kept, strict=True)], np.float32))

    sampled = torch.from_numpy(
        _joined_rows([member.rollout.logprobs[mask] for member, mask in zip(members, kept, strict=True)], np.float32)
    )
    names = ("advantages", "rl_weights", "ce_weights", "ref_kl_weights", "ref_logprobs")
    segments = _joined_rows([np.full(mask.sum(), number) for number, mask in enumerate(kept)], np.int64)
    tokens = PolicyTokens(
        logprobs=sampled,
        proximal=sampled,
        rollout=sampled,
        segments=torch.from_numpy(segments),
        num_segments=len(members),
        **{name: stream(name) for name in names},
    )
    is_policy = _joined_rows([member.rollout.is_policy[mask] for member, mask in zip(members, kept, strict=True)], np.bool_)
    support_ids, support_logprobs = _support(members, kept)
    routes = None if experts is None else _routes(documents, batch, num_layers, experts)
    is_replayed_LT = None if routes is None else routes[..., 0] >= 0
    pick_rows, picks = _picks(documents, batch, num_layers)
    return LearnerPack(
        batch=batch,
        members=members,
        tokens=tokens,
        is_policy=torch.from_numpy(is_policy),
        routes=routes,
        support_ids=support_ids,
        support_logprobs=support_logprobs,
        has_support=torch.tensor([member.streams.support_ids is not None for member in members], dtype=torch.bool),
        num_supported=sum(
            int(np.count_nonzero(member.streams.ref_kl_weights)) for member in members if member.streams.support_ids is not None
        ),
        num_policy=int(is_policy.sum()),
        num_rl=int(tokens.is_rl.sum()),
        num_replayed=(0, 0) if is_replayed_LT is None else (int(is_replayed_LT.sum()), int(is_replayed_LT.any(dim=0).sum())),
        pick_rows=pick_rows,
        picks=picks,
        num_picks=0 if picks is None else int((picks >= 0).sum()),
    )


def _joined_rows(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype=dtype)


def _support(members: Sequence[LearnerSample], kept: Sequence[np.ndarray]) -> tuple[Tensor | None, Tensor | None]:
    """Supports of all members, as wide as the widest."""
    widths = [member.streams.support_ids.shape[1] for member in members if member.streams.support_ids is not None]
    if not widths:
        return None, None
    total, width = sum(int(mask.sum()) for mask in kept), max(widths)
    ids, logprobs = np.full((total, width), -1, dtype=np.int64), np.zeros((total, width), dtype=np.float32)
    start = 0
    for member, mask in zip(members, kept, strict=True):
        end = start + int(mask.sum())
        own_ids, own_logprobs = member.streams.support_ids, member.streams.support_logprobs
        if own_ids is not None and own_logprobs is not None:
            ids[start:end, : own_ids.shape[1]] = own_ids[mask]
            logprobs[start:end, : own_ids.shape[1]] = own_logprobs[mask]
        start = end
    return torch.from_numpy(ids), torch.from_numpy(logprobs)


def _routes(
    documents: Sequence[JoinedDocument], batch: PackedBatch, num_layers: int, experts: tuple[int, int]
) -> Tensor | None:
    """[L, T, K]: each token's experts; a trunk's are those of the first member that tells them."""
    num_experts, num_picked = experts
    if all(member.rollout.routes is None for one in documents for member in one.members):
        return None
    routes = np.full((batch.num_tokens, num_layers, num_picked), -1, dtype=np.int16)
    for one, span in zip(documents, batch.layout.spans, strict=True):
        for member, predictor in reversed(list(zip(one.members, one.predictors, strict=True))):
            own = member.rollout.routes
            if own is None:
                continue
            check_routes(own, num_layers, num_experts, num_picked, str(member.rollout.id))
            trunk = member.num_prompt - 1
            routes[span.start : span.start + trunk] = own[:trunk]
            start = span.start + predictor
            routes[start : start + len(own) - trunk] = own[trunk:]
    return torch.from_numpy(routes).transpose(0, 1).contiguous()


def _picks(documents: Sequence[JoinedDocument], batch: PackedBatch, num_layers: int) -> tuple[Tensor | None, Tensor | None]:
    """`LearnerPack.pick_rows` and `picks`."""
    rows: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    for one, span in zip(documents, batch.layout.spans, strict=True):
        for member, predictor in zip(one.members, one.predictors, strict=True):
            own, trunk = member.rollout.picks, member.num_prompt - 1
            if own is None or not len(own.places_N):
                continue
            if own.keys_NLK.shape[1] != num_layers:
                raise ValueError(f"{member.rollout.id}: picks of {own.keys_NLK.shape[1]} layers; the model has {num_layers}")
            for found, places in ((rows, own.places_N), (keys, own.keys_NLK)):
                moved = np.where(places < trunk, places, places - trunk + predictor) + span.start
                found.append(np.where(places < 0, -1, moved))
    if not rows:
        return None, None
    width = max(part.shape[2] for part in keys)
    wide = [np.pad(part, ((0, 0), (0, 0), (width - part.shape[2], 0)), constant_values=-1) for part in keys]
    picks = torch.from_numpy(np.concatenate(wide).astype(np.int32)).transpose(0, 1).contiguous()
    return torch.from_numpy(_joined_rows(rows, np.int64)), picks
