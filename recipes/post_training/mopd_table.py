"""One table of everything that `mopd.sh` has scored: python -m recipes.post_training.mopd_table runs/mopd

Means over seeds, with 95% intervals by Student's t over seeds; of one seed, the interval over its examples. What is not there
yet is left out.
"""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
# 97.5% quantiles by degrees of freedom
FIRST = ("start", "teachers", "student", "mixed", "sequential", "answers_sft", "average")
Scores = dict[str, dict[str, list[tuple[float, float, float]]]]
# (mean, low, high) of each seed, by model and domain


def read_scores(folder: Path, reward: str = "outcome") -> Scores:
    """Everything below `folder/scores`: MODEL/DOMAIN.json, or MODEL/SEED/DOMAIN.json."""
    found: Scores = defaultdict(lambda: defaultdict(list))
    for path in sorted((folder / "scores").rglob("*.json")):
        row = json.loads(path.read_text())["rewards"][reward]
        model = path.relative_to(folder / "scores").parts[0]
        found[model][path.stem].append((row["mean"], *row["interval"]))
    return found


def cell(seeds: list[tuple[float, float, float]]) -> str:
    """`0.812 ±0.010`; of one seed half the width of its own interval."""
    means = np.array([mean for mean, _, _ in seeds])
    if len(means) == 1:
        half = (seeds[0][2] - seeds[0][1]) / 2
    else:
        half = STUDENT_T[min(9, len(means) - 1)] * means.std(ddof=1) / math.sqrt(len(means))
    return f"{means.mean():.3f} ±{half:.3f}"


def table(scores: Scores) -> list[str]:
    """Lines of Markdown: a row a model, a column a domain; last the worst distance from a teacher, in points."""
    domains = sorted({domain for by_domain in scores.values() for domain in by_domain})
    names = [name for name in FIRST if name in scores] + sorted(name for name in scores if name not in FIRST)
    lines = [f"| model | {' | '.join(domains)} | mean | farthest behind a teacher |", "|" + "---|" * (len(domains) + 3)]
    for name in names:
        own = scores[name]
        cells = [cell(own[domain]) if domain in own else "" for domain in domains]
        means = {domain: float(np.mean([mean for mean, _, _ in own[domain]])) for domain in domains if domain in own}
        taught = {domain: float(np.mean([mean for mean, _, _ in seeds])) for domain, seeds in scores["teachers"].items()} \
            if "teachers" in scores else {}  # fmt: skip
        behind = [(100 * (means[domain] - taught[domain]), domain) for domain in means if domain in taught]
        worst = "{:+.1f} ({})".format(*min(behind)) if behind and name != "teachers" else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {np.mean(list(means.values())):.3f} | {worst} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table(read_scores(Path(sys.argv[1]), *sys.argv[2:3]))))
