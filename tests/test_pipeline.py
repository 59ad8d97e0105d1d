import datasets
import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    ImageClassificationPipeline,
    ResNetConfig,
    ResNetForImageClassification,
    pipeline,
)
from transformers.pipelines.pt_utils import KeyDataset

from hf_scan import ExitConfig, ScanForImageClassification

from .conftest import random_scan_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with thresholds by which some images leave at each exit."""
    path = tmp_path_factory.mktemp("checkpoint")
    model = random_scan_model(image_size=32)
    model.exit_config = ExitConfig(thresholds=[0.55, 0.6, 0.8])
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pictures():
    pixels = torch.randint(0, 255, (12, 40, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [Image.fromarray(image.numpy()) for image in pixels]


@pytest.fixture(scope="module")
def expected(folder, pictures):
    model = ScanForImageClassification.from_pretrained(folder)
    pixel_values = AutoImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt")["pixel_values"]
    return model, pixel_values


@pytest.mark.parametrize("batch_size", [1, 5])
def test_leaves_early_where_the_checkpoint_has_thresholds(folder, pictures, expected, batch_size):
    model, pixel_values = expected
    answers = model.predict_adaptive(pixel_values)
    assert len(answers.exit_index.unique()) > 1
    classify = pipeline("image-classification", model=str(folder), batch_size=batch_size)
    found = classify(pictures, top_k=2, return_exit=True)
    assert [row[0]["label"] for row in found] == [model.config.id2label[int(i)] for i in answers.logits.argmax(-1)]
    assert [row[0]["exit"] for row in found] == answers.exit_index.tolist()
    assert [row[0]["score"] for row in found] == pytest.approx(answers.logits.softmax(-1).amax(-1).tolist(), abs=1e-4)
    assert all(len(row) == 2 for row in found)
    assert set(classify(pictures[0])[0]) == {"label", "score"}


def test_runs_no_more_than_it_has_to(folder, pictures):
    classify = pipeline("image-classification", model=str(folder))
    classify.model.exit_config = ExitConfig(thresholds=[0.0, 0.0])
    ran = []
    for name in ("layer1", "layer2", "layer3"):
        layer = classify.model.backbone.get_submodule(name)
        layer.register_forward_hook(lambda *_, name=name: ran.append(name))
    classify(pictures[0])
    assert ran == ["layer1"]


@pytest.mark.parametrize("when", ["made", "called"])
def test_can_be_turned_off(folder, pictures, expected, when):
    model, pixel_values = expected
    with torch.no_grad():
        logits = model(pixel_values).logits
    made, called = ({"adaptive": False}, {}) if when == "made" else ({}, {"adaptive": False})
    found = pipeline("image-classification", model=str(folder), **made)(pictures, **called)
    assert [row[0]["label"] for row in found] == [model.config.id2label[int(i)] for i in logits.argmax(-1)]


@pytest.mark.parametrize("when", ["made", "called"])
def test_takes_another_operating_point(folder, pictures, expected, when):
    model, pixel_values = expected
    point = ExitConfig(thresholds=[0.5, None, 0.7], fallback="deepest")
    answers = model.predict_adaptive(pixel_values, exit_config=point)
    assert not torch.equal(answers.exit_index, model.predict_adaptive(pixel_values).exit_index)
    made, called = ({"exit_config": point}, {}) if when == "made" else ({}, {"exit_config": point})
    classify = pipeline("image-classification", model=str(folder), **made)
    assert [row[0]["exit"] for row in classify(pictures, return_exit=True, **called)] == answers.exit_index.tolist()
    with pytest.raises(ValueError, match="There are no thresholds"):
        classify(pictures[0], exit_config=ExitConfig())
    with pytest.raises(ValueError, match="An `exit_config` is given and `adaptive` is False"):
        classify(pictures[0], exit_config=point, adaptive=False)


def test_without_thresholds_the_deepest_exit_answers(folder, pictures, expected, tmp_path):
    plain = random_scan_model(image_size=32)
    plain.save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path))
    with torch.no_grad():
        logits = expected[0](expected[1][:1]).logits
    assert classify(pictures[0])[0]["label"] == plain.config.id2label[int(logits.argmax())]
    with pytest.raises(ValueError, match="There are no thresholds"):
        classify(pictures[0], adaptive=True)
    with pytest.raises(ValueError, match="`return_exit` is given, and the answers are not adaptive"):
        classify(pictures[0], return_exit=True)


def as_list(pictures, folder):
    return pictures


def as_paths(pictures, folder):
    for index, picture in enumerate(pictures):
        picture.save(folder / f"{index}.png")
    return [str(folder / f"{index}.png") for index in range(len(pictures))]


def as_generator(pictures, folder):
    return (picture for picture in pictures)


def as_key_dataset(pictures, folder):
    return KeyDataset(datasets.Dataset.from_dict({"image": pictures}).cast_column("image", datasets.Image()), "image")


@pytest.mark.parametrize("given", [as_list, as_paths, as_generator, as_key_dataset])
@pytest.mark.parametrize("thresholds", [None, [0.55, 0.6, 0.8]])
def test_batches_of_the_deepest_exit_are_any_size(folder, pictures, tmp_path, thresholds, given):
    """Among them more images than there are exits, with which Transformers would take the exits for the images."""
    model = ScanForImageClassification.from_pretrained(folder)
    model.exit_config = ExitConfig(thresholds=thresholds)
    processor = AutoImageProcessor.from_pretrained(folder)
    classify = pipeline("image-classification", model=model, image_processor=processor)
    with torch.no_grad():
        logits = model(processor(pictures, return_tensors="pt")["pixel_values"]).logits
    expected = [model.config.id2label[int(index)] for index in logits.argmax(-1)]
    for batch_size in (model.num_exits + 1, 5, len(pictures)):
        found = list(classify(given(pictures, tmp_path), batch_size=batch_size, adaptive=False))
        assert [row[0]["label"] for row in found] == expected
    if thresholds is None:
        found = list(classify(given(pictures, tmp_path), batch_size=5))
        assert [row[0]["label"] for row in found] == expected


def test_other_models_are_left_alone(folder, pictures):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    other = ResNetForImageClassification(config).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    classify = pipeline("image-classification", model=other, image_processor=processor)
    with torch.no_grad():
        logits = other(processor(pictures[0], return_tensors="pt")["pixel_values"]).logits
    assert classify(pictures[0])[0]["label"] == other.config.id2label[int(logits.argmax())]
    with pytest.raises(ValueError, match="a ResNetForImageClassification has no early exits"):
        classify(pictures[0], adaptive=True)
    with pytest.raises(ValueError, match="`exit_config` is given, and a ResNetForImageClassification has no early"):
        classify(pictures[0], exit_config=ExitConfig(thresholds=[0.9]))
    with pytest.raises(ValueError, match="`exit_config` is given, and a ResNetForImageClassification has no early"):
        classify(pictures[0], exit_config=ExitConfig(thresholds=[0.9]), adaptive=False)


# Older versions of Transformers take neither arrays nor tensors for images of a pipeline.
TAKES_ARRAYS = "ndarray" in ImageClassificationPipeline.preprocess.__code__.co_names


@pytest.mark.parametrize("given", ["picture", "path", *(["array", "tensor"] if TAKES_ARRAYS else [])])
def test_images_of_16_bits_are_answered_as_those_of_8(folder, tmp_path, given):
    """PIL would make them white."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32), dtype=np.uint8)
    answers = []
    for name, values in (("deep", pixels.astype(np.uint16) * 257), ("plain", pixels)):
        Image.fromarray(values).save(tmp_path / f"{name}.png")
        images = {
            "picture": Image.fromarray(values),
            "path": str(tmp_path / f"{name}.png"),
            "array": values[None],
            "tensor": torch.from_numpy(values[None]),
        }
        answers.append(pipeline("image-classification", model=str(folder))(images[given], return_exit=True))
    assert answers[0] == answers[1]
    wrong = Image.fromarray(pixels.astype(np.int32) * 300)
    with pytest.raises(ValueError, match="an image of PIL cannot be used: An image of mode 'I' holds values"):
        pipeline("image-classification", model=str(folder))(wrong)


def test_a_damaged_image_is_named(folder, pictures, tmp_path):
    pictures[0].save(tmp_path / "cat.png")
    (tmp_path / "cat.png").write_bytes((tmp_path / "cat.png").read_bytes()[:-1000])
    with pytest.raises(OSError, match=r"cat\.png cannot be read as an image .*Repair or replace it"):
        pipeline("image-classification", model=str(folder))([pictures[1], str(tmp_path / "cat.png")])


class Accuracy(evaluate.Metric):
    """As `evaluate.load("accuracy")`, which the Hub would be asked for."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.array(predictions) == np.array(references)))}


def test_evaluator(folder, pictures, expected):
    """By name; a pipeline object is more than `evaluate` 0.4.6 can take with Transformers 5, whatever the model."""
    model, pixel_values = expected
    labels = [index % 5 for index in range(len(pictures))]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(5)})
    rows = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    scores = evaluate.evaluator("image-classification").compute(
        model_or_pipeline=str(folder), data=rows, metric=Accuracy(), label_mapping=model.config.label2id
    )
    answers = model.predict_adaptive(pixel_values).logits.argmax(-1)
    assert scores["accuracy"] == pytest.approx(float((answers == torch.tensor(labels)).float().mean()))
