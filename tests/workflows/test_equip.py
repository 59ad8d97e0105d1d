"""The whole way, with a tiny network whose exits can learn what there is to see."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_scan import Equipped, ExitConfig, ScanConfig, ScanForImageClassification, advise, equip, image_splits
from hf_scan.calibration import collect_exit_logits
from hf_scan.cli import main
from hf_scan.data import some_digests
from hf_scan.model.image_processing_scan import create_image_processor
from hf_scan.runtime import ORTScanForImageClassification
from hf_scan.training.baseline import plain_copy
from hf_scan.workflows import equip as module
from hf_scan.workflows.equip_arguments import EquipArguments
from hf_scan.workflows.linear_probe import fit_classifier


SETTINGS = {"image_size": 32, "search_epochs": 2, "epochs": 1, "batch_size": 16, "max_exits": 1, "holdout": 0.3}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two classes of colours that any exit tells apart."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(140):
        path = folder / ("train" if number < 100 else "test") / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (36, 32, 3)) + 150 * np.eye(3, dtype=int)[number % 2]
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Of a network of five other classes."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "cifar.safetensors"
    save_file(timm.create_model("cifar_resnet20", num_classes=5).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def made(photos, weights, tmp_path_factory) -> tuple[Equipped, Path]:
    output = tmp_path_factory.mktemp("runs") / "faster"
    settings = {**SETTINGS, "max_accuracy_drop": 20, "runtime": "onnx"}
    return equip("cifar_resnet20", str(photos), str(output), weights=str(weights), **settings), output


def test_what_it_writes_is_whole(made, photos, weights):
    result, output = made
    assert {path.name for path in output.iterdir()} == {
        *("README.md", "config.json", "exit_config.json", "metrics.json", "model.safetensors", "onnx"),
        *("placement.png", "preprocessor_config.json", "steps"),
    }
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["splits"] == {"train": 70, "search": 30, "test": 40}
    assert metrics["result"] == result.to_dict()
    rows = {row["name"]: row for row in metrics["rows"]}
    assert rows["plain backbone"]["accuracy"] == result.plain_accuracy  # known, since the backbone is frozen
    assert rows["adaptive"]["accuracy"] == result.accuracy
    model = AutoModelForImageClassification.from_pretrained(output).eval()
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert model.exit_config.fallback == "deepest"
    # The weights' own images are not known; those of the heads are.
    unknown = [part for part in model.exit_config.trained_on.split("; ") if part.startswith("unknown")]
    assert unknown == ["unknown: weights of cifar.safetensors"]
    assert model.exit_config.search["max_accuracy_drop"] == 20
    source = timm.create_model("cifar_resnet20", num_classes=5)
    source.load_state_dict({**source.state_dict(), **_load(weights)})
    assert torch.equal(model.backbone.layer3[2].conv2.weight, source.layer3[2].conv2.weight)  # frozen
    # The export beside it answers as the checkpoint does.
    pixels = AutoImageProcessor.from_pretrained(output)(
        [Image.open(path) for path in sorted((photos / "test").rglob("*.png"))[:5]], return_tensors="pt"
    )["pixel_values"]
    answers = ORTScanForImageClassification.from_pretrained(output).predict_adaptive(pixels)
    expected = model.predict_adaptive(pixels)
    assert answers.exit_index.tolist() == expected.exit_index.tolist()
    assert torch.allclose(answers.logits, expected.logits, atol=1e-4)


def _load(file):
    from safetensors.torch import load_file

    return load_file(file)


def test_four_lines_say_it(made):
    result, output = made
    lines = str(result).splitlines()
    assert [line.split(":")[0] for line in lines] == ["Accuracy", "Speed-up", "Written to", "Next"]
    assert "measured in ONNX Runtime, batch size 1" in lines[1]
    assert str(output) in lines[2]


def test_it_goes_on_where_it_stopped(photos, weights, tmp_path, capsys, monkeypatch):
    """Killed while exits are trained: neither the classifier nor the search is done again; the same comes out."""
    arguments = {**SETTINGS, "weights": str(weights), "max_accuracy_drop": 20, "runtime": "pytorch"}
    request = EquipArguments(model="cifar_resnet20", data=str(photos), output=str(tmp_path / "run"), **arguments)
    train = module.train_candidates

    def killed(model, images, folder, **settings):
        if Path(folder).name == "train":
            raise KeyboardInterrupt
        train(model, images, folder, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_candidates", killed)
        with pytest.raises(KeyboardInterrupt):
            module.run_equip(request)
    assert not (tmp_path / "run" / "config.json").exists()
    first = capsys.readouterr().out
    # An estimate comes before the first step, and is corrected in every epoch and by every step.
    reading, images, estimate, step, *_ = first.splitlines()
    assert reading == f"Reading cifar_resnet20 and the images of {photos.name}"
    assert images == "70 train, 40 test, 30 search images"
    assert re.match(r"This takes about \d+ minutes?: ", estimate)
    assert re.fullmatch(r"\[1/5\] Fit a classifier .* \(about \d+ minutes? left\)", step)
    assert re.search(r"epoch 1 of 2: loss \S+, about \d+ minutes? left in all", first)
    assert len(re.findall(r"\[\d/5\] .* \(about \d+ minutes? left\)", first)) == 3
    assert "{'loss'" not in first
    trained = []

    def counted(model, images, folder, **settings):
        trained.append(Path(folder).name)
        train(model, images, folder, **settings)

    monkeypatch.setattr(module, "train_candidates", counted)
    module.run_equip(request)
    assert trained == ["train"]
    again = capsys.readouterr().out
    assert again.count("done before") == 2
    # Another target needs no other search. The images that find thresholds have chosen the exits: both choices count.
    request.max_accuracy_drop = 25
    choose = module.choose_exits
    monkeypatch.setattr(module, "choose_exits", lambda *given: replace(choose(*given), accuracy_margin=2.5))
    module.run_equip(request)
    assert trained == ["train"]
    assert json.loads((tmp_path / "run" / "exit_config.json").read_text())["search"]["accuracy_margin"] == 2.5


def test_weights_of_the_images_classes_are_recognised(photos, tmp_path, capsys, monkeypatch):
    """When a run goes on: the network that is built of them has random exits, which are not used."""
    file = tmp_path / "two.safetensors"
    save_file(timm.create_model("cifar_resnet20", num_classes=2).state_dict(), file)
    monkeypatch.setattr(module, "check_classes", lambda *_: None)  # it is not trained
    arguments = {**SETTINGS, "weights": str(file), "runtime": "pytorch"}
    request = EquipArguments(model="cifar_resnet20", data=str(photos), output=str(tmp_path / "run"), **arguments)
    for _ in range(2):
        module._Run(request).prepare_plain()
    assert capsys.readouterr().out.count("done before") == 1


def test_where_no_exit_pays_it_says_so(photos, weights, tmp_path, monkeypatch):
    """Heads as dear as the network."""
    costs = module.costs_of_parts

    def dear(*arguments):
        found = costs(arguments[0], "macs").to_dict()
        found["shares"]["heads"][:-1] = [1.0 for _ in found["shares"]["heads"][:-1]]
        return module.PartCosts.from_dict(found)

    monkeypatch.setattr(module, "costs_of_parts", dear)
    result = equip("cifar_resnet20", str(photos), str(tmp_path / "run"), weights=str(weights), **SETTINGS)
    assert result.speedup == 1.0
    assert result.accuracy == result.plain_accuracy
    assert "The best exit is layer" in result.next_step
    assert not (tmp_path / "run" / "config.json").exists()
    assert json.loads((tmp_path / "run" / "steps" / "placement.json").read_text())["exit_points"] == []


@pytest.mark.parametrize("right", [True, False])
def test_classes_are_those_of_the_weights(photos, tmp_path, right):
    """A network that knows the two classes, and one whose classes are in the other order."""
    torch.manual_seed(0)
    source = timm.create_model("cifar_resnet20", num_classes=2)
    model = ScanForImageClassification.from_timm(source, image_size=32)
    fit_classifier(model, image_splits(photos, create_image_processor(model), crop="none")["train"])
    with torch.no_grad():
        for parameter in () if right else (model.backbone.fc.weight, model.backbone.fc.bias):
            parameter.copy_(parameter.flip(0))
    save_file(model.backbone.state_dict(), tmp_path / "weights.safetensors")
    arguments = ("cifar_resnet20", str(photos), str(tmp_path / "run"))
    request = EquipArguments(*arguments, weights=str(tmp_path / "weights.safetensors"), image_size=32)
    run = module._Run(request)
    assert run.plain.config.id2label == {0: "cat", 1: "dog"}
    if right:
        run.prepare_plain()
        assert torch.equal(run.plain.backbone.fc.weight, model.backbone.fc.weight)
    else:
        with pytest.raises(ValueError, match="hardly more than by chance among 2 classes"):
            run.prepare_plain()


def test_images_that_the_weights_were_trained_on_are_refused_before_the_first_step(photos, tmp_path):
    """Of a plain run that kept other images aside than this one would."""
    model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=2, image_size=32))
    plain_copy(model).save_pretrained(tmp_path / "plain")
    kept = image_splits(photos, create_image_processor(model), holdout=0.2, seed=1)
    ExitConfig(trained_on=some_digests(kept["train"])).save_pretrained(tmp_path / "plain")
    settings = {**SETTINGS, "weights": str(tmp_path / "plain")}
    message = r"The network was trained on the 'search' split, or a part of it.* The `holdout` of that training"
    with pytest.raises(ValueError, match=message):
        equip("cifar_resnet20", str(photos), str(tmp_path / "run"), **settings)
    assert not (tmp_path / "run" / "steps" / "plain.json").exists()


def test_bad_requests_are_refused_before_images_are_read(tmp_path, capsys):
    settings = {"model": "cifar_resnet20", "data": str(tmp_path / "none"), "output": str(tmp_path / "run")}
    for changes, message in (
        ({"weights": str(tmp_path / "none.pth")}, "There is no file"),
        ({"model": "resnet_of_dreams", "weights": str(tmp_path)}, "There is no file config.json in"),
        ({"runtime": "tensorrt"}, "`runtime` is 'tensorrt'"),
        ({"runtime": "macs"}, "serves nothing"),
        ({"max_exits": 0}, "`max_exits` is 0"),
        ({"max_accuracy_drop": -1}, "`max_accuracy_drop` is -1"),
        ({"holdout": 1.5}, "`holdout` is 1.5"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            equip(**{**settings, **changes})
        assert not (tmp_path / "run").exists()
    assert main(["equip", "--model", "cifar_resnet20"]) == 2
    assert "--data" in capsys.readouterr().err


def test_a_network_of_torchvision_by_its_name(photos, tmp_path):
    """Its own classes or others, prepared as torchvision prepares images for it."""
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(num_classes=2).eval()
    torch.save(plain.state_dict(), tmp_path / "resnet18.pth")
    given = ("torchvision/resnet18", str(photos), str(tmp_path / "run"), str(tmp_path / "resnet18.pth"))
    source = module.load_source(EquipArguments(*given, image_size=32))
    config, pixels = source.config, torch.randn(2, 3, 32, 32)
    assert (config.backbone_source, config.backbone, config.image_size) == ("torchvision", "resnet18", 32)
    assert config.preprocessing["mean"] == [0.485, 0.456, 0.406]
    assert torch.equal(source.eval().backbone(pixels), plain(pixels))
    other = module.for_classes(source, ["cat", "dog", "cow"]).eval()
    assert (other.config.id2label, other.config.backbone) == ({0: "cat", 1: "dog", 2: "cow"}, "resnet18")
    splits = image_splits(photos, create_image_processor(other), crop="none")
    before = other.backbone.fc.weight.clone()
    fit_classifier(other, splits["test"])
    assert not torch.equal(other.backbone.fc.weight, before)
    kept = [name for name in plain.state_dict() if not name.startswith("fc.")]
    assert all(torch.equal(other.backbone.state_dict()[name], plain.state_dict()[name]) for name in kept)


def test_names_and_weights_that_torchvision_does_not_have(tmp_path):
    given = {"data": str(tmp_path / "none"), "output": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="torchvision has no classifier 'resnet_of_dreams'"):
        equip("torchvision/resnet_of_dreams", **given)
    with pytest.raises(ValueError, match="torchvision has no classifier 'resnet_of_dreams'"):
        advise("torchvision/resnet_of_dreams")
    save_file({"fc.bias": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights of 'torchvision/resnet18'"):
        equip("torchvision/resnet18", weights=str(tmp_path / "weights.safetensors"), **given)
    with pytest.raises(ValueError, match=r"holds no classifier\.1\.bias, of the classifier"):
        equip("torchvision/mobilenet_v2", weights=str(tmp_path / "weights.safetensors"), **given)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        equip("torchvision/resnet18", weights="none.pth", **given)


@pytest.mark.slow
def test_a_network_of_torchvision_is_equipped(photos, tmp_path):
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), tmp_path / "resnet18.pth")
    settings = {**SETTINGS, "max_accuracy_drop": 20, "runtime": "pytorch", "weights": str(tmp_path / "resnet18.pth")}
    equip("torchvision/resnet18", str(photos), str(tmp_path / "run"), **settings)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert (model.config.backbone_source, model.config.backbone) == ("torchvision", "resnet18")


def test_the_folder_of_a_plain_run_is_taken(photos, tmp_path):
    """With the images that it was trained on, and only as the model that it is."""
    model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=2, image_size=32))
    plain_copy(model).save_pretrained(tmp_path)
    ExitConfig(trained_on="1: ab").save_pretrained(tmp_path)
    data, output = str(photos), str(tmp_path / "out")
    source = module.load_source(EquipArguments("cifar_resnet20", data, output, weights=str(tmp_path)))
    assert source.exit_config.trained_on == "1: ab"
    assert torch.equal(source.backbone.fc.weight, model.backbone.fc.weight)
    with pytest.raises(ValueError, match=r"is said to be 'resnet18', and the weights in .* are of 'cifar_resnet20'"):
        equip("resnet18", data, output, weights=str(tmp_path))


def test_finetuning_trains_few_candidates_jointly_and_compares_with_the_network_that_was_brought(
    photos, weights, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(module, "JOINT_CANDIDATES", 2)
    settings = {**SETTINGS, "weights": str(weights), "max_accuracy_drop": 20, "runtime": "pytorch", "finetune": True}
    result = equip("cifar_resnet20", str(photos), str(tmp_path / "run"), **settings)
    printed = capsys.readouterr().out
    assert "Place exits: 2 candidates" in printed
    assert "Train the network with 2 exits" in printed
    assert "since 2 are trained with the network" in printed

    steps = tmp_path / "run" / "steps"
    brought = torch.load(steps / "plain.pt", weights_only=True)
    placed = ScanForImageClassification.from_pretrained(steps / "search" / "model").backbone.state_dict()
    trained = ScanForImageClassification.from_pretrained(tmp_path / "run").backbone.state_dict()
    assert all(torch.equal(placed[name], value) for name, value in brought.items())
    assert not torch.equal(trained["conv1.weight"], brought["conv1.weight"])

    # The accuracy to hold is that of the network as it was brought, on both splits.
    model = ScanForImageClassification.from_pretrained(steps / "search" / "model").eval()
    rows = image_splits(str(photos), create_image_processor(model), holdout=0.3)
    search, test = (collect_exit_logits(model, rows[name], name) for name in ("search", "test"))
    accuracies = [float((table.deepest == table.labels).mean()) for table in (search, test)]
    target = json.loads((tmp_path / "run" / "exit_config.json").read_text())["search"]["min_accuracy"]
    assert (target, result.plain_accuracy) == (pytest.approx(accuracies[0] - 0.2), accuracies[1])


def test_a_loss_on_the_test_images_that_was_not_allowed_is_said():
    arguments = EquipArguments(model="cifar_resnet20", data="photos", output="runs/faster", max_accuracy_drop=0.5)
    search = SimpleNamespace(table=range(400), speedup=1.5)
    fast, slow = SimpleNamespace(speedup=1.6), SimpleNamespace(speedup=0.9)
    assert module._next_step(arguments, search, fast, lost=0.012).startswith(
        "try it with `hf-scan predict runs/faster"
    )
    said = module._next_step(arguments, search, fast, lost=0.021)
    assert said.startswith("more was lost on the test images than the 0.5 points")
    assert "400 search images" in said
    assert module._next_step(arguments, search, slow, lost=0.021).startswith("exits do not pay here: 0.90x measured")
