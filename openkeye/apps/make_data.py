"""`openkeye make-data RECIPE`: training data from one's own videos and pictures."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from openkeye.common.checks import InputError

if TYPE_CHECKING:
    from openkeye.data.makers.captioner import Captioner
    from openkeye.data.makers.cutouts import CutoutSource
    from openkeye.data.makers.made_sample import Recipe

SUMMARY = "make training data from your own videos and pictures"

RESUME_NOTE = (
    "DIR/data.jsonl gets a line for each sample: chat messages with media, the task, and the truth as data where there is one. "
    "Run the same command again to go on after Ctrl-C, a crash or new files: what is done is not done again."
)
RECIPES = {
    "interleaved-segments": "a video in segments of 15 s, each followed by its caption",
    "scene-captions": "scenes found by their cuts, a caption with times for each, and an overview",
    "temporal-grounding": "questions about when, in four forms, from annotated events",
    "clue-choice": "multiple choice that verifies segments and names its clue intervals, from annotated events",
    "instance-pasting": "objects pasted on pictures: counting and boxes",
    "rendered-ocr": "text on receipts, signs, forms, tables and charts, spoilt as photographs are",
    "caption": "pictures or videos captioned anew, or alt texts repaired",
}
DESCRIPTIONS = {
    "interleaved-segments": "Cuts every video into segments of equal length, without encoding anything anew, and lets the "
    "captioner say what each shows. A sample shows a segment, says its caption, shows the next, and so on.",
    "scene-captions": "Finds the scenes of every video by its hard cuts, lets the captioner describe each, and asks it for an "
    "overview of the descriptions. A sample asks for all of it and answers with the times of each scene.",
    "temporal-grounding": "Asks about times in four forms: what happens in a window (referred-action), when a sentence is true "
    "(highlight), which parts sum up the video (summary), and when the same happens again (matching).",
    "clue-choice": "Asks what happens, what comes next, and how often. Answers reason over candidate segments within <think>, "
    "and end with the letter and the clue intervals [[mm:ss, mm:ss], ...]. Wrong options are sentences of other videos.",
    "instance-pasting": "Pastes cut-out objects on background pictures with bounded overlap. Each picture has a question that "
    "counts and one that asks for boxes, in thousandths of the picture's sides.",
    "rendered-ocr": "Draws documents with this machine's fonts and spoils them by folds, perspective, light, blur, noise and "
    "JPEG. Each has a question for the whole text, and most have one for a fact on it.",
    "caption": "Lets the captioner describe every picture or video of a folder in detail; with --alt-texts, lets it repair the "
    "texts that were found beside them.",
}
CAPTIONED = ("interleaved-segments", "scene-captions", "caption")
FORMS = "referred-action,highlight,summary,matching"
TEMPLATES = "receipt,sign,form,table,chart"
PERTURBATIONS = "wrinkle,perspective,lighting,blur,noise,jpeg"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A parser for each recipe, with the options that it has."""
    parser.epilog = RESUME_NOTE
    subparsers = parser.add_subparsers(dest="recipe", metavar="RECIPE", required=True)
    for name, summary in RECIPES.items():
        recipe = subparsers.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=RESUME_NOTE
        )
        _ADD_OPTIONS[name](recipe)
        if name in CAPTIONED:
            _add_captioner_options(recipe)
        _add_shared_options(recipe)


def _add_segment_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--videos", required=True, type=Path, metavar="DIR", help="folder of videos, searched with its subfolders"
    )
    parser.add_argument("--segment-seconds", type=float, default=15.0, metavar="S", help="length of a segment (default: 15)")
    parser.add_argument(
        "--max-segments", type=int, default=40, metavar="N", help="of one sample; longer videos become several (default: 40)"
    )


def _add_scene_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--videos", required=True, type=Path, metavar="DIR", help="folder of videos, searched with its subfolders"
    )
    parser.add_argument(
        "--min-scene-seconds", type=float, default=1.0, metavar="S", help="shorter scenes join the one before (default: 1)"
    )
    parser.add_argument(
        "--max-scene-seconds", type=float, default=60.0, metavar="S", help="longer ones are divided (default: 60)"
    )
    parser.add_argument(
        "--cut-distance",
        type=float,
        default=0.2,
        metavar="X",
        help="least change between two frames that is a cut, 0 to 1; smaller finds more (default: 0.2)",
    )
    parser.add_argument(
        "--cut-ratio",
        type=float,
        default=2.0,
        metavar="X",
        help="a cut is so many times the largest other change within half a second (default: 2)",
    )


def _add_event_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--videos", required=True, type=Path, metavar="DIR", help="folder of the annotated videos")
    parser.add_argument(
        "--annotations",
        required=True,
        type=Path,
        metavar="FILE",
        help='JSON lines: {"video": "a.mp4", "duration": 30.0, "events": [{"start": 1.5, "end": 4.0, "text": "a dog barks"}]}; '
        "an event may have a score, how remarkable it is",
    )


def _add_grounding_options(parser: argparse.ArgumentParser) -> None:
    _add_event_options(parser)
    parser.add_argument("--forms", default=FORMS, metavar="LIST", help=f"forms to ask in (default: {FORMS})")
    parser.add_argument("--max-per-form", type=int, default=2, metavar="N", help="questions of a form for a video (default: 2)")


def _add_choice_options(parser: argparse.ArgumentParser) -> None:
    _add_event_options(parser)
    parser.add_argument("--options", type=int, default=4, metavar="N", help="to choose from, 2 to 8 (default: 4)")


def _add_pasting_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pictures",
        required=True,
        type=Path,
        metavar="DIR",
        help="backgrounds; they must not show what is pasted (known and avoided where --coco annotates them)",
    )
    parser.add_argument("--num", type=int, default=100, metavar="N", help="pictures to make (default: 100)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--cutouts", type=Path, metavar="DIR", help="PNG or WebP with transparency: DIR/dog/1.png or DIR/dog_1.png is a dog"
    )
    source.add_argument("--coco", type=Path, metavar="FILE", help="COCO annotations with polygons or run lengths")
    parser.add_argument("--coco-pictures", type=Path, metavar="DIR", help="pictures of --coco (default: those of --pictures)")
    parser.add_argument("--objects", default="1..12", metavar="A..B", help="objects in a picture (default: 1..12)")
    parser.add_argument(
        "--min-visible", type=float, default=0.7, metavar="X", help="share of every object that stays uncovered (default: 0.7)"
    )
    parser.add_argument("--side", type=int, default=640, metavar="N", help="longest side of a picture (default: 640 pixels)")


def _add_ocr_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num", type=int, default=100, metavar="N", help="pictures to make (default: 100)")
    parser.add_argument("--templates", default=TEMPLATES, metavar="LIST", help=f"documents to draw (default: {TEMPLATES})")
    parser.add_argument(
        "--perturb", default=PERTURBATIONS, metavar="LIST", help=f"what may spoil them, or none (default: {PERTURBATIONS})"
    )
    parser.add_argument("--perturb-share", type=float, default=0.5, metavar="X", help="how likely each is (default: 0.5)")
    parser.add_argument("--fonts", type=Path, metavar="DIR", help="folder of fonts (default: this machine's)")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="texts for signs, one a line (default: built-in phrases)")


def _add_caption_options(parser: argparse.ArgumentParser) -> None:
    media = parser.add_mutually_exclusive_group(required=True)
    media.add_argument("--pictures", type=Path, metavar="DIR", help="folder of pictures, searched with its subfolders")
    media.add_argument("--videos", type=Path, metavar="DIR", help="folder of videos, searched with its subfolders")
    parser.add_argument(
        "--alt-texts",
        type=Path,
        metavar="FILE",
        help='repair found texts instead of captioning anew: JSON lines {"file": "a.jpg", "text": "..."}',
    )


_ADD_OPTIONS = {
    "interleaved-segments": _add_segment_options,
    "scene-captions": _add_scene_options,
    "temporal-grounding": _add_grounding_options,
    "clue-choice": _add_choice_options,
    "instance-pasting": _add_pasting_options,
    "rendered-ocr": _add_ocr_options,
    "caption": _add_caption_options,
}


def _add_captioner_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("captioner")
    group.add_argument(
        "--captioner",
        required=True,
        metavar="NAME",
        help="who writes the captions: a checkpoint folder, openkeye-tiny, or the address of an OpenAI-compatible API "
        "(https://HOST/v1; its key is read from the environment variable OPENAI_API_KEY)",
    )
    group.add_argument("--captioner-model", metavar="NAME", help="model of the API")
    group.add_argument("--captioner-max-tokens", type=int, default=512, metavar="N", help="longest caption (default: 512)")
    group.add_argument("--captioner-fps", type=float, default=1.0, metavar="X", help="of an API: frames a second (default: 1)")
    group.add_argument(
        "--captioner-frames", type=int, default=32, metavar="N", help="of an API: most frames in a request (default: 32)"
    )
    group.add_argument("--device", metavar="NAME", help="of a checkpoint: cpu or cuda (default: a GPU where there is one)")


def _add_shared_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for data.jsonl and made pictures")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of phrasings and everything drawn by chance (default: 0)"
    )
    group.add_argument(
        "--copy-media", action="store_true", help="copy the media into DIR/media (default: name them where they are)"
    )
    group.add_argument(
        "--max-bad-share",
        type=float,
        default=0.1,
        metavar="X",
        help="unusable files are named and skipped; stop when more than this share is (default: 0.1)",
    )
    group.add_argument(
        "--workers", type=int, default=1, metavar="N", help="jobs at once; an API answers several faster (default: 1)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Make what is not made yet, with a bar on standard error; prints the path of the samples."""
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from openkeye.data.makers.captioner import CaptionerError
    from openkeye.data.makers.output import DATA, OutputFolder
    from openkeye.data.makers.run import make_data

    if arguments.seed < 0:
        raise InputError(f"--seed is {arguments.seed}; give a whole number from 0 on")
    captioner = _captioner(arguments) if arguments.recipe in CAPTIONED else None
    recipe = _captioned_recipe(arguments, captioner) if captioner is not None else _plain_recipe(arguments)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    is_person = sys.stderr.isatty()
    progress = Progress(*columns, console=Console(stderr=True), disable=not is_person)
    with OutputFolder(arguments.out, recipe.name, recipe.settings, arguments.copy_media) as output:

        def tell(text: str) -> None:
            if is_person:
                progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=sys.stderr)

        try:
            with progress:
                task = progress.add_task(recipe.name, total=None)
                report = make_data(
                    recipe,
                    output,
                    arguments.max_bad_share,
                    arguments.workers,
                    lambda done, total: progress.update(task, completed=done, total=total),
                    tell,
                    None if captioner is None else captioner.stop,
                )
        except CaptionerError as error:
            raise InputError(f"{error} ({output.num_samples} samples are kept)") from error
        except KeyboardInterrupt:
            print(f"{output.num_samples} samples are kept; run the same command to go on", file=sys.stderr)
            raise
        parts = [f"{report.num_samples} samples made", f"{output.num_samples} in all"]
        parts += [f"{report.num_done_before} of {report.num_jobs} jobs were done before"] if report.num_done_before else []
        parts += [f"{report.num_empty} gave none"] if report.num_empty else []
        parts += [f"{len(report.skipped)} skipped"] if report.skipped else []
        print("; ".join(parts), file=sys.stderr)
        print(arguments.out / DATA)
    return 0


def _captioned_recipe(arguments: argparse.Namespace, captioner: "Captioner") -> "Recipe":
    """The recipe that the options describe; InputError for options that make no sense and files that are not there."""
    from openkeye.data.makers.caption import Caption, read_alt_texts
    from openkeye.data.makers.interleaved_segments import InterleavedSegments
    from openkeye.data.makers.scene_captions import SceneCaptions
    from openkeye.data.makers.scene_cuts import CutDetector

    if arguments.recipe == "interleaved-segments":
        lengths = arguments.segment_seconds, arguments.max_segments
        return InterleavedSegments(arguments.videos, captioner, arguments.seed, *lengths)
    if arguments.recipe == "scene-captions":
        detector = CutDetector(arguments.cut_distance, arguments.cut_ratio)
        scene_seconds = arguments.min_scene_seconds, arguments.max_scene_seconds
        return SceneCaptions(arguments.videos, captioner, arguments.seed, *scene_seconds, detector)
    folder, kind = (arguments.pictures, "picture") if arguments.pictures else (arguments.videos, "video")
    alt_texts = None if arguments.alt_texts is None else read_alt_texts(arguments.alt_texts)
    return Caption(folder, kind, captioner, arguments.seed, alt_texts)


def _plain_recipe(arguments: argparse.Namespace) -> "Recipe":
    """The same of recipes whose words are known."""
    from openkeye.data.makers.clue_choice import ClueChoice
    from openkeye.data.makers.events import AnnotatedVideos
    from openkeye.data.makers.fonts import find_fonts
    from openkeye.data.makers.instance_pasting import InstancePasting
    from openkeye.data.makers.rendered_ocr import RenderedOcr
    from openkeye.data.makers.temporal_grounding import TemporalGrounding

    if arguments.recipe == "temporal-grounding":
        annotated = AnnotatedVideos(arguments.annotations, arguments.videos)
        return TemporalGrounding(annotated, arguments.seed, _names(arguments.forms), arguments.max_per_form)
    if arguments.recipe == "clue-choice":
        return ClueChoice(AnnotatedVideos(arguments.annotations, arguments.videos), arguments.seed, arguments.options)
    if arguments.recipe == "instance-pasting":
        sizes = _range(arguments.objects), arguments.min_visible, arguments.side
        return InstancePasting(arguments.pictures, _cutouts(arguments), arguments.num, arguments.seed, *sizes)
    return RenderedOcr(
        arguments.num,
        tuple(find_fonts(arguments.fonts)),
        arguments.seed,
        _names(arguments.templates),
        () if arguments.perturb == "none" else _names(arguments.perturb),
        arguments.perturb_share,
        () if arguments.texts is None else _lines(arguments.texts),
    )


def _cutouts(arguments: argparse.Namespace) -> "CutoutSource":
    from openkeye.data.makers.cutouts import CocoCutouts, CutoutFolder

    if arguments.coco is not None:
        return CocoCutouts(arguments.coco, arguments.coco_pictures or arguments.pictures)
    return CutoutFolder(arguments.cutouts)


def _captioner(arguments: argparse.Namespace) -> "Captioner":
    """The model that `--captioner` names."""
    import os

    if arguments.captioner_max_tokens < 1:
        raise InputError(f"--captioner-max-tokens is {arguments.captioner_max_tokens}; give 1 or more")
    if "://" in arguments.captioner:
        from openkeye.data.makers.api_captioner import ApiCaptioner, ApiSettings

        return ApiCaptioner(
            ApiSettings(
                base_url=arguments.captioner,
                model=arguments.captioner_model or "",
                api_key=os.environ.get("OPENAI_API_KEY"),
                max_tokens=arguments.captioner_max_tokens,
                fps=arguments.captioner_fps,
                max_frames=arguments.captioner_frames,
            )
        )
    from openkeye.apps.engine_captioner import EngineCaptioner
    from openkeye.apps.model_options import checked_device

    return EngineCaptioner(arguments.captioner, checked_device(arguments.device), arguments.captioner_max_tokens)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _range(text: str) -> tuple[int, int]:
    try:
        low, high = (int(part) for part in text.split(".."))
    except ValueError:
        raise InputError(f"--objects is {text!r}; give a range such as 1..12") from None
    return low, high


def _lines(path: Path) -> tuple[str, ...]:
    try:
        lines = tuple(" ".join(line.split()) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a file of texts in UTF-8, one a line") from error
    if not lines:
        raise InputError(f"{path}: an empty file; give texts, one a line")
    return lines
