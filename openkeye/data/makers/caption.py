"""Recipe `caption`: pictures and videos captioned anew, or found texts repaired (report, 3.2: Recaption and Remake)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from openkeye.common.checks import InputError
from openkeye.data.makers.captioner import Captioner, ask_captioner
from openkeye.data.makers.made_sample import MadeSample, assistant, image_part, job_rng, pick, text_part, user, video_part
from openkeye.data.makers.media_folder import PICTURE_ENDINGS, VIDEO_ENDINGS, find_media
from openkeye.inputs.image import open_image
from openkeye.inputs.video_scan import scan_video

RECAPTION = {
    "picture": "Describe this picture in detail in one paragraph: what is seen, where it stands, colours, and any text. Say "
    "only what can be seen.",
    "video": "Describe this video in detail in one paragraph: place, people and things, what happens in which order, and any "
    "text on screen. Say only what can be seen.",
}
REMAKE = (
    'This text was found beside the {kind}: "{text}"\nWrite it anew as one correct caption of the {kind}. Keep the names and '
    "facts that fit what is seen, mend grammar and wording, and drop what cannot be seen or only advertises. Answer "
    "with the caption alone."
)
DETAILED_PROMPTS = (
    "Describe the {kind} in detail.",
    "What does this {kind} show? Be thorough.",
    "Write a detailed caption of this {kind}.",
    "Tell everything that can be seen in the {kind}.",
)
SHORT_PROMPTS = (
    "Caption the {kind}.",
    "What is this {kind} about?",
    "Write a short caption of this {kind}.",
    "Describe the {kind} in a sentence.",
)


def read_alt_texts(path: Path) -> dict[str, str]:
    """Found texts: JSON lines `{"file": path below the media folder, "text"}`.

    Raises:
        InputError: the file cannot be read, or a line is not of this form.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a file of JSON lines in UTF-8") from error
    texts = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            name, text = record["file"], record["text"]
            if not (isinstance(name, str) and isinstance(text, str) and text.strip()):
                raise TypeError(f"file {name!r} and text {text!r:.40}")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f'{path}:{number}: {error!r}; expected {{"file": "a.jpg", "text": "..."}}') from error
        texts[name] = " ".join(text.split())
    return texts


@dataclass(frozen=True)
class Caption:
    """One sample a picture or video."""

    folder: Path
    kind: str
    # "picture" or "video"
    captioner: Captioner
    seed: int = 0
    alt_texts: Mapping[str, str] | None = None
    # file to found text: Remake instead of Recaption, of the files that have one

    name = "caption"

    def __post_init__(self) -> None:
        if self.kind not in RECAPTION:
            raise ValueError(f"kind is {self.kind!r}; expected {' or '.join(RECAPTION)}")

    @property
    def settings(self) -> Mapping[str, Any]:
        """See `Recipe.settings`."""
        mode = "recaption" if self.alt_texts is None else "remake"
        return {"seed": self.seed, "mode": mode, "kind": self.kind, "captioner": self.captioner.name}

    @cached_property
    def _files(self) -> list[str]:
        files = find_media(self.folder, PICTURE_ENDINGS if self.kind == "picture" else VIDEO_ENDINGS)
        if self.alt_texts is None:
            return files
        known = [name for name in files if name in self.alt_texts]
        if not known:
            raise InputError(
                f"{self.folder}: none of its {len(files)} files has an alt text; give paths as seen from this folder"
            )
        return known

    def jobs(self) -> Sequence[str]:
        """One for each file, or each that has a found text."""
        return self._files

    def make(self, job: str) -> list[MadeSample]:
        """See `Recipe.make`."""
        path = self.folder / job
        # Whether it is readable at all is told before a model is asked.
        if self.kind == "picture":
            open_image(path)
            part = image_part(path)
        else:
            scan_video(path)
            part = video_part(path)
        rng = job_rng(self.seed, job)
        if self.alt_texts is None:
            prompt, prompts, task, truth = RECAPTION[self.kind], DETAILED_PROMPTS, "recaption", {}
        else:
            found = self.alt_texts[job]
            prompt = REMAKE.format(kind=self.kind, text=found.replace('"', "'"))
            prompts, task, truth = SHORT_PROMPTS, "remake", {"alt_text": found}
        caption = ask_captioner(self.captioner, [user(part, text_part(prompt))], job)
        question = user(part, text_part(pick(rng, prompts).format(kind=self.kind)))
        return [MadeSample([question, assistant(caption)], task, truth)]
