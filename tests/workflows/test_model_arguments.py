import pytest
import torch
from safetensors.torch import save_file

from hf_scan import ExitConfig
from hf_scan.training.baseline import plain_copy
from hf_scan.workflows.model_arguments import (
    DEFAULT_BACKBONE,
    ModelArguments,
    check_network,
    create_model,
    load_plain_network,
)

from ..conftest import random_scan_model


def test_a_backbone_that_the_weights_are_not_of_is_refused(tmp_path):
    model = random_scan_model()
    plain_copy(model).save_pretrained(tmp_path)
    ExitConfig(trained_on="1: ab").save_pretrained(tmp_path)
    names, weights = list("abcde"), str(tmp_path)
    settings = {"backbone_weights": weights, "image_size": 16}
    for name in ("resnet50", DEFAULT_BACKBONE):  # named, if only as the default would be
        said = rf"is said to be '{name}', and the weights in .* are of 'cifar_resnet20'"
        with pytest.raises(ValueError, match=said):
            create_model(ModelArguments(backbone=name, **settings), names)
    for given in ({}, {"backbone": "cifar_resnet20"}):
        found = create_model(ModelArguments(**given, **settings), names)
        assert found.exit_config.trained_on == "1: ab"
        assert torch.equal(found.backbone.conv1.weight, model.backbone.conv1.weight)


def test_weights_of_a_file_are_taken_over(tmp_path):
    """As safetensors and as a pickle of tensors; the number of classes is the file's."""
    model = random_scan_model()
    weights = model.backbone.state_dict()
    torch.save({"state_dict": weights}, tmp_path / "weights.pth")
    save_file(weights, tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        plain = load_plain_network("cifar_resnet20", tmp_path / name)
        assert plain.num_classes == 5
        assert torch.equal(plain.fc.weight, model.backbone.fc.weight)
        network = ModelArguments(backbone="cifar_resnet20", backbone_weights=str(tmp_path / name), image_size=16)
        found = create_model(network, ["a", "b"])  # other classes: the classifier starts anew, nothing else does
        assert torch.equal(found.backbone.conv1.weight, model.backbone.conv1.weight)
        assert found.backbone.fc.weight.shape[0] == 2
        assert found.exit_config.trained_on == f"unknown: weights of {name}"


class Opens:
    """A pickle of it opens a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_files_that_hold_no_weights_of_the_network_are_refused(tmp_path):
    torch.save({"weights": Opens(str(tmp_path / "opened"))}, tmp_path / "code.pth")
    (tmp_path / "text.safetensors").write_text("no weights")
    save_file(random_scan_model().backbone.state_dict(), tmp_path / "other.safetensors")
    save_file({"head.weight": torch.zeros(2, 2)}, tmp_path / "head.safetensors")
    for name in ("code.pth", "text.safetensors"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read as weights"):
            load_plain_network("cifar_resnet20", tmp_path / name)
    assert not (tmp_path / "opened").exists()
    with pytest.raises(ValueError, match=r"holds no fc.weight, the classifier of 'cifar_resnet20'"):
        load_plain_network("cifar_resnet20", tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"does not hold the weights of 'cifar_resnet32'"):
        load_plain_network("cifar_resnet32", tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_plain_network("cifar_resnet20", tmp_path / "none.safetensors")


def test_a_network_is_checked_without_images_or_weights(tmp_path):
    with pytest.raises(ValueError, match="`backbone` is 'resnet_of_dreams'"):
        check_network(ModelArguments(backbone="resnet_of_dreams", backbone_weights="timm"))
    with pytest.raises(ValueError, match="`exit_points` holds 'layer9'"):
        check_network(ModelArguments(backbone="cifar_resnet20", exit_points=["layer9"]))
    plain_copy(random_scan_model()).save_pretrained(tmp_path)
    check_network(ModelArguments(backbone_weights=str(tmp_path), exit_points=["layer2"]))


def test_a_module_of_the_user_is_imported_first(tmp_path, monkeypatch):
    (tmp_path / "networks_of_mine.py").write_text(
        "from timm.models import register_model\n"
        "from hf_scan.model.cifar_backbones import cifar_resnet20\n\n"
        "@register_model\ndef resnet_of_mine(**kwargs):\n    return cifar_resnet20(**kwargs)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    check_network(ModelArguments(backbone="resnet_of_mine", import_module="networks_of_mine"))
    with pytest.raises(ModuleNotFoundError):
        check_network(ModelArguments(import_module="networks_of_nobody"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ('{"in_chans": 1}', "names 'in_chans', which is not expected: a run turns all images into three channels"),
        ('{"num_classes": 3}', "names 'num_classes', which is not expected: a run has the classes of its images"),
        ("{'depth': 6}", "cannot be read as JSON .*; expected arguments for timm"),
    ],
)
def test_arguments_that_no_flag_takes(given, said):
    with pytest.raises(ValueError, match=rf"`--backbone_kwargs` {said}"):
        create_model(ModelArguments(backbone="cifar_resnet20", backbone_kwargs=given), ["a", "b"])
