"""Recipe `rendered-ocr`: documents drawn from templates and spoilt as photographs are, with their text (report, 3.2)."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openkeye.common.checks import InputError
from openkeye.data.makers.made_sample import MadeSample, assistant, image_part, job_rng, pick, text_part, user
from openkeye.data.makers.ocr_perturbations import PERTURBATIONS
from openkeye.data.makers.ocr_templates import TEMPLATES

READ_PROMPTS = (
    "Read all the text in the picture, line by line.",
    "What is written here? Give the whole text.",
    "Transcribe the picture's text.",
    "Write down everything that can be read, from top to bottom.",
)


@dataclass(frozen=True)
class RenderedOcr:
    """Numbered pictures, each with a question for its whole text and, where the template has one, for a fact on it."""

    num_pictures: int
    fonts: tuple[str, ...]
    # paths, as of `fonts.find_fonts`
    seed: int = 0
    templates: tuple[str, ...] = tuple(TEMPLATES)
    perturbations: tuple[str, ...] = tuple(PERTURBATIONS)
    perturbation_share: float = 0.5
    # how likely each one is
    texts: tuple[str, ...] = ()
    # one's own, for signs

    name = "rendered-ocr"

    def __post_init__(self) -> None:
        for what, chosen, known in (
            ("template", self.templates, TEMPLATES),
            ("perturbation", self.perturbations, PERTURBATIONS),
        ):
            unknown = [name for name in chosen if name not in known]
            if unknown:
                raise InputError(f"{what} {unknown[0]!r} is unknown; choose from {', '.join(known)}")
        if not self.templates or not self.fonts:
            raise InputError("no template or no font to draw with; give at least one of each")
        if self.num_pictures < 1:
            raise InputError(f"{self.num_pictures} pictures; give at least 1")
        if not 0.0 <= self.perturbation_share <= 1.0:
            raise InputError(f"the share of perturbations is {self.perturbation_share:g}; give a number from 0 to 1")

    @property
    def settings(self) -> Mapping[str, Any]:
        """See `Recipe.settings`."""
        names = ("fonts", "templates", "perturbations", "texts")
        lists = {name: list(getattr(self, name)) for name in names}
        return {"seed": self.seed, "perturbation_share": self.perturbation_share} | lists

    def jobs(self) -> Sequence[str]:
        """One for each picture to make."""
        return [f"{number:06d}" for number in range(self.num_pictures)]

    def make(self, job: str) -> list[MadeSample]:
        """See `Recipe.make`."""
        rng = job_rng(self.seed, job)
        template, font = pick(rng, self.templates), pick(rng, self.fonts)
        page = TEMPLATES[template](rng, font, self.texts)
        picture, applied = page.picture, []
        for name, perturb in PERTURBATIONS.items():
            if name in self.perturbations and rng.random() < self.perturbation_share:
                picture = perturb(picture, rng)
                applied.append(name)
        file = io.BytesIO()
        picture.save(file, "PNG")
        name = f"pictures/{job}.png"
        text = "\n".join(page.lines)
        questions = [("ocr_text", pick(rng, READ_PROMPTS), text)]
        if page.question:
            questions.append((f"ocr_{template}", page.question, page.answer))
        truth = {"text": text, "template": template, "perturbations": applied}
        return [
            MadeSample(
                [user(image_part(name), text_part(prompt)), assistant(answer)],
                task,
                truth | ({"answer": answer} if task != "ocr_text" else {}),
                {name: file.getvalue()},
            )
            for task, prompt, answer in questions
        ]
