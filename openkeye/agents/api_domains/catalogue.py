"""All worlds by name, and which of them are kept from training."""

import hashlib
from functools import cache

from openkeye.agents.api_domains.schema import Domain
from openkeye.agents.api_domains.worlds import city, culture, food, health, industry, media, office, sport, trade, travel

THEMES = (travel, city, health, culture, media, sport, trade, food, industry, office)
NUM_TRAIN = 120
SPLITS = ("train", "held_out", "all")


@cache
def domains() -> dict[str, Domain]:
    """Every world by its name, in the order of the themes."""
    return {domain.name: domain for theme in THEMES for domain in theme.DOMAINS}


@cache
def split(name: str) -> tuple[Domain, ...]:
    """The worlds of a split of SPLITS. A hash of the names decides, so that a new world moves few others."""
    ordered = sorted(domains().values(), key=lambda domain: hashlib.sha256(domain.name.encode()).hexdigest())
    return tuple({"train": ordered[:NUM_TRAIN], "held_out": ordered[NUM_TRAIN:], "all": ordered}[name])
