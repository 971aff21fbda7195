"""The book of a run: which groups are open, what there is of their rollouts, which updates have consumed which.

It is a function of the journal's events, applied one by one, the same while they happen and after a restart. Whatever is
done goes through `record`: first to the disk, then into the book. A rollout counts once, or an assertion fails.

opened ─> (partial) ─> finished ─> scored ─┬─> consumed by an update
             └───── stale: anew ─────┘     ├─> dropped
                                           └─> asked again, where all failed: more members, each opened as the others were
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from openkeye.engine.recorded_answer import Picks
from openkeye.rl.context_rl import RecoverySettings, as_learnt, is_success
from openkeye.rl.journal import Event, Journal
from openkeye.rl.roles import AskedAgain, PartialRollout, RolloutOrder, ScoredRollout
from openkeye.rl.rollout import Rollout, RolloutId

ROLLOUT_ARRAYS = ("prompt_ids", "output_ids", "is_policy", "logprobs", "versions", "routes")
PICK_PLACES, PICKED_KEYS = "pick_places", "picked_keys"
EXTRA = "extra."
# before the names of arrays that a scorer has added
MIN_COMPARED = 2
# rollouts of a group that have to be there for one to be better than another


@dataclass
class Member:
    """What there is of one rollout."""

    attempt: int = 0
    partial: Event | None = None
    finished: Event | None = None
    scored: Event | None = None
    again: AskedAgain | None = None
    # not one of the group's own: with what it is asked again

    @property
    def rewards(self) -> Mapping[str, float]:
        """As they are known; none before it is finished."""
        event = self.scored or self.finished
        return {} if event is None else event.facts["rewards"]

    @property
    def is_failed(self) -> bool:
        """Whether its environment broke, or nobody could score it."""
        return "failed" in (event.facts.get("finish_reason") for event in (self.finished, self.scored) if event is not None)

    @property
    def oldest_version(self) -> int | None:
        """Of what there is of it; None where nothing has been sampled."""
        event = self.finished or self.partial
        return None if event is None else event.facts["oldest_version"]

    def events(self) -> Iterator[Event]:
        """Everything that is still needed of it."""
        yield from (event for event in (self.partial, self.finished, self.scored) if event is not None)


@dataclass
class Group:
    """Rollouts of one example."""

    opened: Event
    members: list[Member]
    completed_at: int = 0
    # a number that counts up: which group was complete first; 0 while it is not
    is_scored: bool = False
    # whether finished rollouts wait for a scorer
    asked_again: Event | None = None
    # where all of its own had failed, and it was seen to; that may have led to no more members

    @property
    def number(self) -> int:
        return self.opened.facts["group"]

    def id(self, member: int) -> RolloutId:
        """Of one rollout."""
        facts = self.opened.facts
        return RolloutId(facts["task"], facts["number"], facts["group"], member)

    def is_done(self, member: Member) -> bool:
        """Whether nothing more is to be known of a rollout."""
        return member.finished is not None and (not self.is_scored or member.is_failed or member.scored is not None)

    @property
    def num_usable(self) -> int:
        return sum(member.finished is not None and not member.is_failed for member in self.members)

    def events(self) -> Iterator[Event]:
        """Everything that is still needed of it."""
        yield self.opened
        if self.asked_again is not None:
            yield self.asked_again
        for number, member in enumerate(self.members):
            if member.attempt:
                yield Event("begun_anew", {"group": self.number, "member": number, "attempt": member.attempt})
            yield from member.events()


@dataclass
class Consumed:
    """An update, and the groups that it has learnt from or is to learn from."""

    event: Event
    groups: list[Group]


class GroupBook:
    """See the top of this file."""

    def __init__(self, journal: Journal, has_scorers: bool, recovery: RecoverySettings) -> None:
        """
        Args:
            has_scorers: whether a finished rollout has to be scored before its group is complete.
            recovery: whether a group whose rollouts all failed is asked again before it is complete.
        """
        self.journal = journal
        self.recovery = recovery
        self._has_scorers = has_scorers
        self._compacted_bytes = 0
        self._replay(journal.events)

    def _replay(self, events: Iterable[Event]) -> None:
        self.groups: dict[int, Group] = {}
        # open ones by number, in that order
        self.updates: dict[int, Consumed] = {}
        # since the last checkpoint, by the version that they begin at
        self.evaluated: dict[int, dict[str, float]] = {}
        # scores by version
        self.next_group = self.next_update = self.checkpoint = 0
        self.published = -1
        # version
        self.counts: Counter[str] = Counter()
        # since the last update was put together
        self._num_completed = 0
        for event in events:
            self._apply(event)

    def record(self, kind: str, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Write down what has happened, and note it."""
        self._apply(self.journal.append(kind, facts, arrays))

    def record_finished(self, order: RolloutOrder, rollout: Rollout) -> None:
        """A rollout has ended."""
        assert rollout.id == order.id, f"{rollout.id} came back for {order.id}"
        sampled = rollout.versions[rollout.is_policy]
        facts = {
            "group": order.id.group,
            "member": order.id.member,
            "attempt": order.attempt,
            "oldest_version": int(sampled.min()) if len(sampled) else None,
            "finish_reason": rollout.finish_reason,
            "rewards": {name: float(value) for name, value in rollout.rewards.items()},
            "text": rollout.text,
            "is_resumed": order.partial is not None,
        }
        self.record("finished", facts, _rollout_arrays(rollout))

    def record_partial(self, order: RolloutOrder, partial: PartialRollout) -> None:
        """There is something of a rollout that another process could go on with."""
        assert partial.id == order.id, f"{partial.id} came back for {order.id}"
        facts = {
            "group": order.id.group,
            "member": order.id.member,
            "attempt": order.attempt,
            "oldest_version": partial.oldest_version,
            "num_tokens": partial.num_tokens,
        }
        self.record("partial", facts, {"state": np.frombuffer(partial.state, dtype=np.uint8)})

    def record_scored(self, group: int, member: int, scored: ScoredRollout) -> None:
        """A scorer has looked at a rollout."""
        facts = {
            "group": group,
            "member": member,
            "rewards": {name: float(value) for name, value in scored.rollout.rewards.items()},
            "finish_reason": scored.rollout.finish_reason,
        }
        self.record("scored", facts, {EXTRA + name: array for name, array in scored.arrays.items()})

    def order(self, group: int, member: int) -> RolloutOrder:
        """What is to be played of a rollout that is not finished."""
        opened, one = self.groups[group], self.groups[group].members[member]
        assert one.finished is None, f"{opened.id(member)} is finished"
        partial = None
        if one.partial is not None:
            facts, state = one.partial.facts, self.journal.arrays(one.partial)["state"].tobytes()
            partial = PartialRollout(opened.id(member), facts["oldest_version"], facts["num_tokens"], state)
        return RolloutOrder(opened.id(member), one.attempt, partial, again=one.again)

    def is_current(self, id: RolloutId, attempt: int) -> bool:
        """Whether a rollout is still open to be finished or scored: not begun anew, nor given up, in the meantime."""
        group = self.groups.get(id.group)
        return group is not None and id.member < len(group.members) and group.members[id.member].attempt == attempt

    def rollout(self, group: Group, member: int) -> ScoredRollout:
        """A finished rollout, read back from the disk."""
        one = group.members[member]
        assert one.finished is not None, f"{group.id(member)} is not finished"
        facts, arrays = one.finished.facts, self.journal.arrays(one.finished)
        picks = Picks(arrays.pop(PICK_PLACES), arrays.pop(PICKED_KEYS)) if PICK_PLACES in arrays else None
        rewards, extras = facts["rewards"], {}
        if one.scored is not None:
            rewards = one.scored.facts["rewards"]
            extras = {name.removeprefix(EXTRA): array for name, array in self.journal.arrays(one.scored).items()}
        rollout = Rollout(
            id=group.id(member),
            finish_reason=facts["finish_reason"],
            rewards=rewards,
            text=facts["text"],
            picks=picks,
            **arrays,
        )
        return ScoredRollout(rollout, extras)

    def usable(self, group: Group) -> list[tuple[int, ScoredRollout]]:
        """(attempt, rollout) of all that did not fail, in the order of members; of those asked again, the ones that join."""
        joined = self.usable_again(group)
        found = [
            (member.attempt, self.rollout(group, number))
            for number, member in enumerate(group.members)
            if not member.is_failed and (member.again is None or number in joined)
        ]
        bare_ids = found[0][1].rollout.prompt_ids if found else np.zeros(0, np.int32)
        return [
            (attempt, replace(one, rollout=as_learnt(one.rollout, bare_ids, self.recovery)))
            if one.rollout.id.member in joined
            else (attempt, one)
            for attempt, one in found
        ]

    def usable_again(self, group: Group) -> list[int]:
        """Numbers of the members that were asked again and are learnt from: the first that succeeded."""
        succeeded = [
            number
            for number, member in enumerate(group.members)
            if member.again and member.finished and not member.is_failed and is_success(member.rewards, self.recovery)
        ]
        return succeeded[: self.recovery.max_joined]

    def in_prompt(self, group: Group, member: int) -> AskedAgain | None:
        """What stands behind the question where a rollout is learnt."""
        return group.members[member].again if self.recovery.trained_on == "report" else None

    def is_recoverable(self, group: Group) -> bool:
        """Whether a group is complete, all of its rollouts have failed at their task, and nobody has seen to it yet."""
        answers = [member for member in group.members if not member.is_failed]
        return (
            self.recovery.is_on
            and bool(group.completed_at)
            and group.asked_again is None
            and bool(answers)
            and not any(is_success(member.rewards, self.recovery) for member in answers)
        )

    def is_comparable(self, group: Group) -> bool:
        """Whether enough of a complete group's rollouts came to an end."""
        return group.num_usable >= min(MIN_COMPARED, len(group.members))

    def compact_if_worth(self, least_bytes: int) -> None:
        """Rewrite the journal with what is still needed, once it has doubled since the last time and grown by these bytes."""
        if self.journal.num_bytes > 2 * self._compacted_bytes + least_bytes:
            self.compact()
            self._compacted_bytes = self.journal.num_bytes

    def compact(self) -> None:
        """Rewrite the journal with what is still needed alone; behind a checkpoint, when no update would be repeated."""
        assert not self.updates, "updates behind the checkpoint would be lost"
        self._replay(self.journal.compact(list(self._needed())))

    def _needed(self) -> Iterable[Event]:
        yield Event(
            "progress",
            {
                "next_group": self.next_group,
                "next_update": self.next_update,
                "checkpoint": self.checkpoint,
                "published": self.published,
            },
        )
        for version, scores in self.evaluated.items():
            if version >= self.checkpoint:
                yield Event("evaluated", {"version": version, "scores": scores})
        for group in sorted(self.groups.values(), key=lambda group: (not group.completed_at, group.completed_at)):
            # In the order of their completion, which is counted anew.
            yield from group.events()
        yield Event("counted", dict(self.counts))

    def _apply(self, event: Event) -> None:
        getattr(self, f"_apply_{event.kind}")(event, event.facts)

    def _apply_progress(self, event: Event, facts: Mapping[str, Any]) -> None:
        self.next_group, self.next_update = facts["next_group"], facts["next_update"]
        self.checkpoint, self.published = facts["checkpoint"], facts["published"]

    def _apply_counted(self, event: Event, facts: Mapping[str, Any]) -> None:
        self.counts = Counter(facts)

    def _apply_opened(self, event: Event, facts: Mapping[str, Any]) -> None:
        number = facts["group"]
        assert number not in self.groups, f"group {number} is open already"
        self.groups[number] = Group(event, [Member() for _ in range(facts["size"])], is_scored=self._has_scorers)
        self.next_group = max(self.next_group, number + 1)

    def _apply_begun_anew(self, event: Event, facts: Mapping[str, Any]) -> None:
        self._member(facts).attempt = facts["attempt"]

    def _apply_partial(self, event: Event, facts: Mapping[str, Any]) -> None:
        member = self._member(facts)
        assert member.finished is None and member.attempt == facts["attempt"], f"{facts} came too late"
        member.partial = event

    def _apply_finished(self, event: Event, facts: Mapping[str, Any]) -> None:
        member = self._member(facts)
        assert member.finished is None and member.attempt == facts["attempt"], f"{facts} counts twice"
        member.finished, member.partial = event, None
        self.counts["resumed"] += facts["is_resumed"]
        self.counts["failed"] += facts["finish_reason"] == "failed"
        self._note_completion(facts)

    def _apply_scored(self, event: Event, facts: Mapping[str, Any]) -> None:
        member = self._member(facts)
        assert member.finished is not None and member.scored is None, f"{facts} counts twice"
        member.scored = event
        self.counts["failed"] += member.is_failed
        self._note_completion(facts)

    def _apply_asked_again(self, event: Event, facts: Mapping[str, Any]) -> None:
        group = self.groups[facts["group"]]
        assert group.asked_again is None, f"group {group.number} is asked again twice"
        group.asked_again = event
        self.counts["asked_again"] += 1
        if facts["with"]:
            # Counted on from the group's own, so that what a worker still has of an earlier time is told apart.
            attempt = sum(member.attempt for member in group.members)
            group.members += [Member(attempt, again=AskedAgain(**one)) for one in facts["with"]]
            group.completed_at = 0

    def _apply_stale(self, event: Event, facts: Mapping[str, Any]) -> None:
        group = self.groups[facts["group"]]
        for number in facts["members"]:
            old = group.members[number]
            group.members[number] = Member(attempt=old.attempt + 1, again=old.again)
        own = [member for member in group.members if member.again is None]
        if any(number < len(own) for number in facts["members"]):
            # The attempts that reports speak of are gone; should all fail again, they are asked again anew.
            group.members, group.asked_again = own, None
        group.completed_at = 0
        self.counts["stale"] += len(facts["members"])

    def _apply_dropped(self, event: Event, facts: Mapping[str, Any]) -> None:
        del self.groups[facts["group"]]
        self.counts[f"dropped_{facts['reason']}"] += 1

    def _apply_consumed(self, event: Event, facts: Mapping[str, Any]) -> None:
        assert facts["update"] == self.next_update, f"update {facts['update']} follows on {self.next_update - 1}"
        self.updates[facts["update"]] = Consumed(event, [self.groups.pop(number) for number in facts["groups"]])
        self.next_update += 1
        self.counts.clear()

    def _apply_published(self, event: Event, facts: Mapping[str, Any]) -> None:
        self.published = facts["version"]

    def _apply_checkpoint(self, event: Event, facts: Mapping[str, Any]) -> None:
        self.checkpoint = facts["version"]
        for version in [version for version in self.updates if version < self.checkpoint]:
            del self.updates[version]

    def _apply_evaluated(self, event: Event, facts: Mapping[str, Any]) -> None:
        self.evaluated[facts["version"]] = dict(facts["scores"])

    def _member(self, facts: Mapping[str, Any]) -> Member:
        return self.groups[facts["group"]].members[facts["member"]]

    def _note_completion(self, facts: Mapping[str, Any]) -> None:
        group = self.groups[facts["group"]]
        if not group.completed_at and all(group.is_done(member) for member in group.members):
            self._num_completed += 1
            group.completed_at = self._num_completed


def _rollout_arrays(rollout: Rollout) -> dict[str, np.ndarray]:
    arrays = {name: array for name in ROLLOUT_ARRAYS if (array := getattr(rollout, name)) is not None}
    if rollout.picks is not None:
        arrays |= {PICK_PLACES: rollout.picks.places_N, PICKED_KEYS: rollout.picks.keys_NLK}
    return arrays
