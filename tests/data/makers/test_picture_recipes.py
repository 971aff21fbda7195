"""Pasted instances and rendered text: the truth is found again in the pixels."""

import io
import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

from openkeye.common.checks import InputError
from openkeye.data.makers.cutouts import CocoCutouts, CutoutFolder, cropped, segmentation_mask
from openkeye.data.makers.fonts import BUILT_IN, can_write, find_fonts, load_font
from openkeye.data.makers.instance_pasting import InstancePasting, box_of, paste
from openkeye.data.makers.made_sample import MadeSample, job_rng
from openkeye.data.makers.ocr_perturbations import PERTURBATIONS
from openkeye.data.makers.ocr_templates import TEMPLATES
from openkeye.data.makers.rendered_ocr import RenderedOcr
from tests.data.makers.media import colour_of, write_background, write_cutouts


def picture_of(sample: MadeSample) -> PIL.Image.Image:
    (content,) = sample.files.values()
    return PIL.Image.open(io.BytesIO(content))


def pasting(folder: Path, **options: object) -> InstancePasting:
    write_background(folder / "pictures" / "grey.png")
    return InstancePasting(folder / "pictures", CutoutFolder(write_cutouts(folder / "cutouts")), 12, **options)


def test_counts_and_boxes_are_in_the_pixels(tmp_path: Path):
    # Fully visible things never touch: each is one spot of its label's colour, and its box is the spot's.
    recipe = pasting(tmp_path, min_visible=1.0, num_objects=(1, 4))
    seen = set()
    for job in recipe.jobs():
        counting, grounding = recipe.make(job)
        truth = counting.truth
        assert counting.messages[-1]["content"] == f"{truth['count']}."
        boxes = json.loads(grounding.messages[-1]["content"])
        assert len(boxes) == truth["count"] and {box["label"] for box in boxes} == {truth["label"]}
        pixels = np.asarray(picture_of(counting)).astype(int)
        rest = pixels.copy()
        for thing in truth["instances"]:
            x1, y1, x2, y2 = (np.array(thing["box"]) * [320, 240, 320, 240] / 1000).round().astype(int)
            colour = colour_of(("ball", "box").index(thing["label"]))
            is_thing = np.abs(pixels - colour).max(-1) < 60
            inside = is_thing[y1:y2, x1:x2]
            # Half-covered edge pixels are mixed with the ground: the spot ends at most two pixels before its box.
            assert inside[:3].any() and inside[-3:].any() and inside[:, :3].any() and inside[:, -3:].any()
            assert thing["visible_share"] == 1.0
            rest[y1:y2, x1:x2] = 128
        assert np.abs(rest - 128).max() < 100, "something was pasted that no box holds"
        seen.add(truth["count"])
    assert len(seen) >= 3


def test_overlap_stays_within_the_asked_share():
    background = PIL.Image.new("RGB", (200, 200))
    disc = PIL.Image.new("RGBA", (80, 80), (0, 0, 0, 0))
    PIL.ImageDraw.Draw(disc).ellipse((0, 0, 79, 79), fill=(255, 0, 0, 255))
    crowd = [cropped("disc", disc, "disc")] * 40
    least = []
    for seed in range(3):
        _, instances = paste(background, crowd, np.random.default_rng(seed), 0.7)
        assert 5 < len(instances) < 40
        least.append(min(thing.visible_share for thing in instances))
    assert 0.7 <= min(least) < 0.95, "things do overlap, and not more than asked"


def test_a_box_by_hand():
    mask = np.zeros((10, 30), dtype=bool)
    mask[2:6, 4:11] = True
    assert box_of(mask) == (133, 200, 367, 600)


def test_the_same_seed_gives_the_same_pictures(tmp_path: Path):
    recipe = pasting(tmp_path)
    assert recipe.make("000003") == recipe.make("000003")
    assert recipe.make("000003") != recipe.make("000004")


def test_labels_come_from_folders_or_names(tmp_path: Path):
    write_cutouts(tmp_path, ("ball",))
    for name in ("red car_12.png", "tree-1.png", "tree-2.png"):
        (tmp_path / name).write_bytes((tmp_path / "ball" / "0.png").read_bytes())
    source = CutoutFolder(tmp_path)
    assert source.labels == ["ball", "red car", "tree"]
    assert [source.num_cutouts(label) for label in source.labels] == [2, 1, 2]
    assert source.read("tree", 0).picture.size == (50, 40)


def test_pictures_that_are_no_cutouts_are_named(tmp_path: Path):
    write_background(tmp_path / "wall_1.png")
    PIL.Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "air_1.png")
    (tmp_path / "torn_1.png").write_bytes(b"\x89PNG")
    source = CutoutFolder(tmp_path)
    for label, reason in (("wall", "all of it is opaque"), ("air", "nothing in it is opaque"), ("torn", "torn_1.png")):
        with pytest.raises(InputError, match=reason):
            source.read(label, 0)


def coco_file(tmp_path: Path) -> CocoCutouts:
    """One picture with a dog as a polygon, a cat as run lengths, a crowd of birds, and horses cut by the edges or small."""
    picture = PIL.Image.new("RGB", (100, 80), (0, 90, 0))
    draw = PIL.ImageDraw.Draw(picture)
    draw.rectangle((20, 10, 59, 39), fill=(200, 0, 0))
    draw.rectangle((60, 40, 89, 69), fill=(0, 0, 200))
    (tmp_path / "pictures" / "train").mkdir(parents=True)
    picture.save(tmp_path / "pictures" / "train" / "farm.png")
    cat = np.zeros((80, 100), dtype=np.uint8)
    cat[40:70, 60:90] = 1
    flat = np.concatenate([[0], cat.ravel(order="F"), [2]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges])).tolist()
    whole = {"image_id": 7, "iscrowd": 0}
    annotations = [
        {**whole, "id": 1, "category_id": 1, "bbox": [20, 10, 40, 30], "segmentation": [[20, 10, 60, 10, 60, 40, 20, 40]]},
        {**whole, "id": 2, "category_id": 2, "bbox": [60, 40, 30, 30], "segmentation": {"size": [80, 100], "counts": counts}},
        {**whole, "id": 3, "category_id": 3, "bbox": [20, 10, 40, 30], "segmentation": [[0, 0, 9, 0, 9, 9]], "iscrowd": 1},
        {**whole, "id": 4, "category_id": 4, "bbox": [0, 10, 40, 30], "segmentation": [[0, 10, 40, 10, 40, 40, 0, 40]]},
        {**whole, "id": 5, "category_id": 4, "bbox": [70, 10, 29, 30], "segmentation": [[70, 10, 99, 10, 99, 40, 70, 40]]},
        {**whole, "id": 6, "category_id": 4, "bbox": [10, 10, 40, 9], "segmentation": [[10, 10, 50, 10, 50, 19, 10, 19]]},
    ]
    names = ("dog", "cat", "bird", "horse")
    content = {
        "images": [{"id": 7, "file_name": "train/farm.png", "width": 100, "height": 80}],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
        "annotations": annotations,
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return CocoCutouts(tmp_path / "instances.json", tmp_path / "pictures")


def test_coco_polygons_and_run_lengths_are_cut_out(tmp_path: Path):
    source = coco_file(tmp_path)
    assert source.labels == ["cat", "dog"], "no crowd, none cut by an edge, none too small"
    for label, size, colour in (("dog", (40, 30), (200, 0, 0)), ("cat", (30, 30), (0, 0, 200))):
        cutout = source.read(label, 0).picture
        assert cutout.size == size
        assert (np.asarray(cutout) == (*colour, 255)).all()


def test_packed_run_lengths_are_read_like_plain_ones():
    from pycocotools import mask as coco

    truth = np.asfortranarray(np.random.default_rng(0).random((40, 30)) < 0.4).astype(np.uint8)
    packed = coco.encode(np.asfortranarray(truth))
    as_text = {"size": packed["size"], "counts": packed["counts"].decode()}
    assert (segmentation_mask(as_text, 40, 30, "x") == truth).all()
    with pytest.raises(InputError, match="neither polygons nor run lengths"):
        segmentation_mask({"size": [40, 30]}, 40, 30, "x")


def test_coco_backgrounds_get_nothing_that_they_show(tmp_path: Path):
    source = coco_file(tmp_path)
    assert InstancePasting(tmp_path / "pictures", source, 4).make("000000") == []
    write_background(tmp_path / "others" / "plain.png")
    assert InstancePasting(tmp_path / "others", source, 4).make("000000")


def test_no_coco_file_is_named(tmp_path: Path):
    (tmp_path / "x.json").write_text('{"images": []}')
    with pytest.raises(InputError, match="not a COCO annotation file"):
        CocoCutouts(tmp_path / "x.json", tmp_path).labels  # noqa: B018


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_pages_hold_their_text_inside_the_picture(template: str):
    font = find_fonts()[0]
    for seed in range(8):
        page = TEMPLATES[template](np.random.default_rng(seed), font, ())
        ink = np.asarray(page.picture.convert("L")).astype(int)
        ground = ink[2, 2]
        # Nothing runs out of the picture: its outermost pixels are paper all around.
        edge = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
        assert np.abs(edge - ground).max() < 12 and np.abs(ink - ground).max() > 60
        text = "\n".join(page.lines)
        if page.question:
            assert page.answer in text
        if template == "receipt":
            prices = [float(line.rpartition(" ")[2]) for line in page.lines[2:-3]]
            assert page.lines[-3] == f"TOTAL {sum(prices):.2f}"


@pytest.mark.parametrize("name", sorted(PERTURBATIONS))
def test_every_perturbation_changes_the_picture_and_keeps_it_readable(name: str):
    page = TEMPLATES["receipt"](np.random.default_rng(5), find_fonts()[0], ()).picture
    clean = np.asarray(page.convert("L")).astype(float)
    for seed in range(4):
        spoilt = PERTURBATIONS[name](page, np.random.default_rng(seed))
        assert spoilt.size == page.size and spoilt.mode == "RGB"
        grey = np.asarray(spoilt.convert("L")).astype(float)
        assert np.abs(grey - clean).mean() > 0.2
        # Contrast of ink and paper is left.
        assert np.percentile(grey, 90) - grey.min() > 70


def test_perturbations_are_switchable_and_told():
    fonts = (find_fonts()[0],)
    clean = RenderedOcr(4, fonts, perturbations=())
    only_noise = RenderedOcr(4, fonts, perturbations=("noise",), perturbation_share=1.0)
    for job in clean.jobs():
        sample, spoilt = clean.make(job)[0], only_noise.make(job)[0]
        assert sample.truth["perturbations"] == [] and spoilt.truth["perturbations"] == ["noise"]
        assert sample.truth["text"] == spoilt.truth["text"] == sample.messages[-1]["content"]
        difference = np.asarray(picture_of(spoilt)).astype(int) - np.asarray(picture_of(sample))
        assert 2 < difference.std() < 18
    assert only_noise.make("000001") == only_noise.make("000001")


def test_the_text_is_on_the_picture():
    # The same letters in another order: the picture is as large, and differs where the last word stands.
    page, again = (TEMPLATES["sign"](job_rng(0, "x"), BUILT_IN, (text,)) for text in ("quite another no", "quite another on"))
    assert page.lines == ("quite another no",) and page.picture.size == again.picture.size
    different = np.abs(np.asarray(page.picture).astype(int) - np.asarray(again.picture)).max(-1).any(0)
    columns = np.flatnonzero(different)
    assert len(columns) > 20 and 0.7 * len(different) < columns.min()


def test_fonts_that_write_nothing_are_left_out(tmp_path: Path):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    assert not can_write(str(tmp_path / "broken.ttf"))
    with pytest.raises(InputError, match="holds no font"):
        find_fonts(tmp_path)
    assert load_font(BUILT_IN, 30).getlength("word") > 20
    page = TEMPLATES["receipt"](np.random.default_rng(0), BUILT_IN, ())
    assert np.asarray(page.picture).std() > 10


def test_options_that_make_no_sense_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="'rain' is unknown; choose from wrinkle"):
        RenderedOcr(1, (BUILT_IN,), perturbations=("rain",))
    with pytest.raises(InputError, match="template 'poem' is unknown"):
        RenderedOcr(1, (BUILT_IN,), templates=("poem",))
    with pytest.raises(InputError, match="5 to 2 objects"):
        pasting(tmp_path, num_objects=(5, 2))
    with pytest.raises(InputError, match="least visible share"):
        pasting(tmp_path, min_visible=0.0)
    assert re.fullmatch(r"\d{6}", pasting(tmp_path).jobs()[0])
