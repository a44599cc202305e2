"""The whole script on a tiny ViT: folders and fields of images, broken ones, exports."""

import io
import json
import re
from pathlib import Path
from typing import Any

import datasets
import jax
import numpy as np
import pytest
from PIL import Image

import lora_jax as lj
from lora_jax import models
from lora_jax.hf.keys import nest_leaves
from tests.models.tiny_encoders import draw
from tests.support import assert_identical, thorough
from tests.train.tiny import write_jsonl
from train.classify import main, parse
from train.console.errors import UserError
from train.data.files import is_image_folder, list_images, read_rows
from train.export import __main__ as export
from train.predict import __main__ as predict
from train.run.classifiers import read_classifier_info
from train.run.costs import ask_words
from train.run.log import read_metrics
from train.tasks import images

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
FIELDS = {
    "model_type": "vit",
    "architectures": ["ViTModel"],
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": [8, 12],
    "patch_size": 4,
}
COLOURS = {"blue": (20, 30, 200), "green": (30, 190, 40), "red": (210, 30, 20)}
KINDS = {"blue": "PNG", "green": "JPEG", "red": "GIF"}


def write_vit(folder: Path, **changes: Any) -> Path:
    """A tiny random ViT without a head, and its processor."""
    config = models.read_config({**FIELDS, **changes})
    rng = np.random.default_rng(5)
    drawn = ((r.path, draw(rng, r.path, r.stacked_shape)) for r in models.key_table(config))
    params = nest_leaves((path, array * 0.5 if array.ndim == 4 else array) for path, array in drawn)
    processor = models.ImageProcessor(size=(8, 12))
    models.save_pretrained(folder, models.VisionEncoder(config), params, tokenizer=processor)
    return folder


def picture(colour: str, seed: int) -> bytes:
    """A file of a noisy image in one of the colours."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 25, (11 + seed % 3, 13, 3)) + COLOURS[colour]
    file = io.BytesIO()
    Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(file, KINDS[colour])
    return file.getvalue()


def write_photos(folder: Path, n: int = 8) -> Path:
    """A folder for each colour, with images at different depths."""
    for colour in COLOURS:
        for i in range(n):
            path = folder / colour / ("more" if i % 2 else "") / f"{i}.{KINDS[colour].lower()}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(colour, i))
    return folder


OPTIONS = ["--batch-size", 4, "--rank", 2, "--alpha", 4, "--lr", 5e-3, "--warmup", 1]
OPTIONS += ["--targets", "query", "value"]


def run(folder: Path, *args: Any) -> Path:
    main([*map(str, (*OPTIONS, *args)), "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and photos."""
    folder = tmp_path_factory.mktemp("made")
    write_vit(folder / "vit")
    write_photos(folder / "photos")
    return folder


@pytest.fixture(scope="module")
def whole(made: Path) -> Path:
    """A run on the photos, beside them."""
    options = ["--model", made / "vit", "--dataset", made / "photos"]
    return run(made / "run", *options, "--steps", 30, "--eval-every", 15)


def adapted(folder: Path) -> tuple[Any, Any, Any]:
    """The model, its adapted tree and the names of its classes."""
    model, params = models.from_pretrained(folder / "vit", head="classification", num_labels=3)
    tree = lj.load_adapter(folder / "run" / "adapter", params)
    return model, tree, lj.adapter_info(folder / "run" / "adapter")["labels"]


def by_hand(folder: Path, files: list[bytes]) -> np.ndarray:
    """The probabilities of images, one at a time."""
    model, tree, _ = adapted(folder)
    processor = models.load_image_processor(folder / "vit")
    forward = jax.jit(lj.adapt(model.apply))
    logits = [forward({"params": tree}, processor([file]))[0] for file in files]
    return np.asarray(jax.nn.softmax(np.stack(logits)))


@pytest.mark.slow
def test_a_run_on_a_folder(made: Path, whole: Path) -> None:
    scores = json.loads((whole / "scores.json").read_text())
    tuned = scores["fine-tuned"]
    assert np.sum(tuned["confusion"]) == 5 and tuned["accuracy"] > 0.7  # colours are easy
    assert sum(one["images"] for one in tuned["classes"].values()) == 5
    _, tree, labels = adapted(made)
    assert labels == ["blue", "green", "red"]
    of_layers = {
        "vit/encoder/layer/attention/attention/" + n for n in ("query/kernel", "value/kernel")
    }
    assert set(lj.split(tree)[0]) == {"classifier/kernel", "classifier/bias", *of_layers}
    lines = read_metrics(whole)
    assert lines[-1]["eval_accuracy"] == pytest.approx(tuned["accuracy"])
    held_out = lines[-1]["eval_loss"]
    rows = parse(["--model", str(made / "vit"), "--dataset", str(made / "photos")])
    test = images.read_images(rows).held_out
    found = by_hand(made, [Path(row["image"]).read_bytes() for row in test])
    right = [labels.index(row["label"]) for row in test]
    assert held_out == pytest.approx(-np.log(found[np.arange(5), right]).mean(), rel=1e-4)


@pytest.mark.slow
@thorough  # as test_sft.py does
def test_a_resumed_run_ends_where_a_whole_one_does(made: Path, tmp_path: Path) -> None:
    options = ["--model", made / "vit", "--dataset", made / "photos", "--log-every", 1]
    options += ["--dropout", 0.1, "--schedule", "constant"]
    run(tmp_path / "whole", *options, "--steps", 6)
    run(tmp_path / "half", *options, "--steps", 3)
    run(tmp_path / "half", *options, "--steps", 6, "--resume")
    _, params = models.from_pretrained(made / "vit", head="classification", num_labels=3)
    found = [
        lj.split(lj.load_adapter(tmp_path / name / "adapter", params))[0]
        for name in ("whole", "half")
    ]
    assert_identical(*found)


def test_a_field_of_images(made: Path, tmp_path: Path) -> None:
    """Bytes as `datasets` stores them, in Parquet and in a folder of its own; and paths."""
    files = {(colour, i): picture(colour, i) for colour in COLOURS for i in range(3)}
    table = datasets.Dataset.from_dict(
        {
            "photo": [{"bytes": one, "path": None} for one in files.values()],
            "colour": [[*COLOURS].index(colour) for colour, _ in files],
        },
        features=datasets.Features(
            {"photo": datasets.Image(), "colour": datasets.ClassLabel(names=[*COLOURS])}
        ),
    )
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "rows.parquet")
    for (colour, i), one in files.items():
        (tmp_path / f"{colour}{i}.png").write_bytes(one)
    rows = [{"photo": f"{colour}{i}.png", "colour": colour} for colour, i in files]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    pixels = []
    for name in ("saved", "rows.parquet", "rows.jsonl"):
        args = ["--model", made / "vit", "--dataset", tmp_path / name, "--image", "photo"]
        config = parse([*map(str, args), "--label", "colour", "--test-share", "0.34"])
        read = images.read_images(config)
        assert (len(read.train), len(read.held_out)) == (5, 4)
        data = images.examples(config, read, images.outline(config, read))
        assert data.facts["lengths"] == (7,) and data.train.pixels.shape == (5, 3, 8, 12)
        pixels.append(data.train.pixels)
        assert data.train.digest() != data.held_out.digest()
    assert np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[0], pixels[2])


def lines_of(capsys: Any, *args: Any) -> list[dict[str, Any]]:
    capsys.readouterr()
    predict.main([*map(str, args)])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_predictions(made: Path, whole: Path, tmp_path: Path, capsys: Any) -> None:
    """Paths, rows in a file, paths in a file and a folder give what is computed by hand."""
    paths = [made / "photos" / "red" / "0.gif", made / "photos" / "green" / "0.jpeg"]
    paths += [made / "photos" / "blue" / "more" / "1.png"]
    want = by_hand(made, [path.read_bytes() for path in paths])
    write_jsonl(tmp_path / "rows.jsonl", [{"photo": str(path)} for path in paths])
    (tmp_path / "paths.txt").write_text("\n".join(map(str, paths)))
    folder = tmp_path / "some"
    folder.mkdir()
    for i, path in enumerate(paths):
        (folder / f"{i}{path.suffix}").write_bytes(path.read_bytes())
    ways = [paths, ["--input", tmp_path / "rows.jsonl", "--field", "photo"]]
    ways += [["--input", tmp_path / "paths.txt"], ["--input", folder]]
    for way in ways:
        found = lines_of(capsys, "--adapter", whole, "--batch-size", 2, *way)
        got = [[line["probabilities"][name] for name in sorted(COLOURS)] for line in found]
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert [Path(line["image"]).name for line in found] == ["0.gif", "1.jpeg", "2.png"]
    for option in (["--seq-len", 8], ["--truncate"]):
        with pytest.raises(SystemExit):
            predict.main([*map(str, ["--adapter", whole, *option, paths[0]])])
        assert "applies to texts" in capsys.readouterr().err
    for broken, i in ((b"", 0), (b"no image", 1), (paths[0].read_bytes()[:150], 2)):
        (tmp_path / f"{i}.png").write_bytes(broken)
    with pytest.raises(SystemExit):
        predict.main([*map(str, ["--adapter", whole, *sorted(tmp_path.glob("*.png"))])])
    said = " ".join(capsys.readouterr().err.split())
    assert "3 of 3 images cannot be used" in said and str(tmp_path / "1.png") in said


@pytest.mark.slow
def test_exports(made: Path, whole: Path, tmp_path: Path, capsys: Any) -> None:
    """A merged model with its processor and classes; PEFT's folder, read again."""
    args = ["--adapter", whole, "--output", tmp_path / "merged", "--merged"]
    export.main([*map(str, args)])
    path = made / "photos" / "red" / "0.gif"
    want = by_hand(made, [path.read_bytes()])[0]
    for way in (["--model", tmp_path / "merged"], ["--adapter", tmp_path / "peft"]):
        if "--adapter" in way:
            args = ["--adapter", whole, "--output", tmp_path / "peft"]
            export.main([*map(str, args)])
            way += ["--model", made / "vit", "--labels", *COLOURS]
        (line,) = lines_of(capsys, path, *way)
        np.testing.assert_allclose([*line["probabilities"].values()], want, atol=1e-5)
    assert models.load_image_processor(tmp_path / "merged").size == (8, 12)
    fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert fields["target_modules"] == ["q_proj", "v_proj"]
    assert (fields["modules_to_save"], fields["task_type"]) == (["classifier"], None)
    assert "AutoModelForImageClassification" in (tmp_path / "peft" / "README.md").read_text()


def test_the_command_that_asks_it_names_an_image(made: Path) -> None:
    outline = read_classifier_info(str(made / "vit"), 3, "images")
    assert ask_words(outline) == ("train.predict", "IMAGE")


@pytest.mark.slow
def test_a_rehearsal(made: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--model", made / "vit", "--dataset", made / "photos", "--steps", 2]
    run(tmp_path / "run", *options, "--dry-run")
    said = capsys.readouterr().out
    assert "the label to learn is 'blue'" in said and "the largest batch is 4 × 7 tokens" in said


def fails(capsys: Any, folder: Path, *args: Any) -> str:
    with pytest.raises(SystemExit) as caught:
        run(folder, *args)
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_broken_images_are_named(made: Path, tmp_path: Path, capsys: Any) -> None:
    """Before weights are read: cut short, empty, and what is no image."""
    photos = write_photos(tmp_path / "photos", 7)
    broken = [photos / "red" / "0.gif", photos / "green" / "2.jpeg", photos / "blue" / "4.png"]
    broken[0].write_bytes(broken[0].read_bytes()[:150])
    broken[1].write_bytes(b"")
    broken[2].write_text("no image")
    (photos / "red" / "notes.txt").write_text("is left out")
    said = fails(capsys, tmp_path / "run", "--model", made / "vit", "--dataset", photos)
    assert "images cannot be used" in said and "remove them" in said
    assert any(str(path) in said for path in broken)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dataset", "photos"], "no default model for images"),
        (["--model", "bert", "--dataset", "photos"], "a bert model, .* Pass a ViT or DINOv2"),
        (["--model", "vit", "--dataset", "rows.jsonl"], "a vit model, .* a field by --image"),
        (["--model", "vit", "--dataset", "photos", "--seq-len", 9], "hold images.* --seq-len"),
        (["--model", "vit", "--dataset", "photos", "--neftune", 5], "hold images.* --neftune"),
        (["--model", "vit", "--dataset", "photos", "--text", "a"], "hold images.* --text"),
        (["--model", "vit", "--dataset", "photos", "--split", "test"], "no folders of splits"),
        (["--model", "vit", "--dataset", "rows.jsonl", "--image", "photo"], "but no `photo`"),
        (["--model", "grey", "--dataset", "photos"], "images of 3 channels .* needs 1 channels"),
        (["--model", "bare", "--dataset", "photos"], "preprocessor_config.json is missing"),
    ],
)
def test_mistakes(
    args: list[Any], message: str, made: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    rows = [{"text": "a", "label": label} for label in "bc" * 5]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_vit(tmp_path / "grey", num_channels=1)
    write_vit(tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "vit").symlink_to(made / "vit")
    (tmp_path / "photos").symlink_to(made / "photos")
    monkeypatch.chdir(tmp_path)
    assert re.search(message, fails(capsys, tmp_path / "run", *args))


def test_folders_of_splits_and_classes(tmp_path: Path) -> None:
    """A class may be called train; a loose image is an error; rows beside images come first."""
    write_photos(tmp_path / "split" / "train", 2)
    write_photos(tmp_path / "split" / "test", 1)
    assert len(read_rows(str(tmp_path / "split"))) == 6
    assert len(read_rows(str(tmp_path / "split"), split="test")) == 3
    with pytest.raises(UserError, match="of its splits: test, train"):
        read_rows(str(tmp_path / "split"), split="validation")
    vehicles = tmp_path / "vehicles"
    for name in ("train", "ship"):
        (vehicles / name).mkdir(parents=True)
        (vehicles / name / "1.PNG").write_bytes(picture("red", 1))
    (vehicles / "ship" / ".hidden.png").write_bytes(b"")
    assert {row["label"] for row in read_rows(str(vehicles))} == {"train", "ship"}
    assert len(read_rows(str(vehicles))) == 2
    (vehicles / "loose.png").write_bytes(picture("red", 1))
    with pytest.raises(UserError, match="loose.png does not belong to a class"):
        read_rows(str(vehicles))
    write_jsonl(vehicles / "rows.jsonl", [{"image": "loose.png", "label": "ship"}])
    assert not is_image_folder(str(vehicles)) and len(read_rows(str(vehicles))) == 1
    assert not is_image_folder(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "P1 notes").write_text("P1 is no image")
    assert not is_image_folder(str(tmp_path / "empty"))


def test_images_are_known_by_how_they_begin(tmp_path: Path, capsys: Any) -> None:
    """Whatever their names end in; what is no image is named."""
    photos = write_photos(tmp_path / "photos", 2)
    for colour in COLOURS:
        (photos / colour / "without").write_bytes(picture(colour, 5))
        (photos / colour / "1.jfif").write_bytes(picture(colour, 6))
    (photos / "red" / "notes.txt").write_text("GIF of nothing")
    (photos / "red" / "Thumbs.db").write_bytes(bytes(range(256)))
    rows = read_rows(str(photos))
    assert len(rows) == 12 and {row["label"] for row in rows} == {*COLOURS}
    said = capsys.readouterr().err
    assert "2 of 14 files are skipped, because they are not images: red/Thumbs.db, red/not" in said
    assert len(list_images(str(photos))) == 12
    for path in [*photos.rglob("*.*")]:
        path.unlink()
    assert len(read_rows(str(photos))) == 3  # none has an ending
