import copy
import json
import logging

import pytest
import timm
import torch
import torchvision
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_scan import ExitConfig, ScanConfig, ScanForImageClassification, ScanTrainer, ScanTrainingArguments, calibrate


PREPARED = {"mean": [0.5] * 3, "std": [0.5] * 3}
PYRAMID = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1], "num_labels": 7}
TOKENS = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 64}


def sequential() -> nn.Sequential:
    def block(channels: int, wider: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, wider, 3, 2, 1), nn.BatchNorm2d(wider), nn.ReLU(inplace=True))

    return nn.Sequential(block(3, 8), block(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 7))


def vit() -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(**TOKENS, image_size=64, patch_size=8, num_labels=7))


MODULES = {
    "torchvision-resnet18": lambda: torchvision.models.resnet18(num_classes=7),
    "torchvision-mobilenet": lambda: torchvision.models.mobilenet_v3_small(num_classes=7),
    "transformers-resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, layer_type="basic", **PYRAMID)
    ),
    "transformers-convnext": lambda: ConvNextForImageClassification(ConvNextConfig(**PYRAMID)),
    "transformers-vit": vit,
    "sequential": sequential,
}
SIZE = 64


def trained(name: str) -> nn.Module:
    """As after training: batch norms are not the identity."""
    torch.manual_seed(0)
    module = MODULES[name]().eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(std=0.2)
            part.running_var.uniform_(0.5, 2)
    return module


@pytest.fixture(scope="module", params=MODULES)
def converted(request) -> tuple[str, nn.Module, ScanForImageClassification]:
    plain = trained(request.param)
    model = ScanForImageClassification.from_module(plain, image_size=SIZE, preprocessing=PREPARED)
    return request.param, plain, model.eval()


def answers(plain: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = plain(images)
    return out if isinstance(out, torch.Tensor) else out.logits


def test_the_deepest_exit_answers_as_the_module_did(converted):
    name, plain, model = converted
    images = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        out = model(images, output_exit_features=True)
        assert torch.equal(out.logits, answers(plain, images))
        assert torch.equal(model.backbone(images), out.logits)
    assert model.num_exits == (2 if name == "sequential" else 4)
    assert len({feature.shape for feature in out.exit_features}) == 1
    assert model.config.num_labels == 7
    assert model.config.backbone_source == {"sequential": "custom"}.get(name, name.partition("-")[0])
    named = {f"backbone.{key}" for key in plain.state_dict()}
    assert named <= set(model.state_dict())


def test_what_is_saved_is_loaded(converted, tmp_path):
    name, _, model = converted
    if name == "sequential":
        with pytest.raises(ValueError, match=r"a Sequential, a module of its own .*`export_onnx` needs no code"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())
        return
    model.save_pretrained(tmp_path / "whole")
    model.truncate(0).save_pretrained(tmp_path / "small")
    # Copied, since the last bit of a convolution may depend on where in memory its weights lie: in a file, anywhere.
    loaded = copy.deepcopy(ScanForImageClassification.from_pretrained(tmp_path / "whole"))
    small = copy.deepcopy(ScanForImageClassification.from_pretrained(tmp_path / "small"))
    saved, found = model.state_dict(), loaded.state_dict()
    assert saved.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in saved.items())
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = model(images).exit_logits
        for one, other in zip(loaded(images).exit_logits, expected, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(small(images).logits, expected[0])


def test_samples_leave_and_the_others_go_on(converted):
    _, _, model = converted
    images = torch.randn(4, 3, SIZE, SIZE)
    with torch.no_grad():
        logits = model(images).exit_logits
    above = sorted(logits[0].softmax(-1).amax(-1).tolist())
    thresholds = [(above[1] + above[2]) / 2, *[None] * (model.num_exits - 2)]
    answer = model.predict_adaptive(images, thresholds=thresholds, fallback="deepest")
    assert sorted(answer.exit_index.tolist()) == [0, 0, *[model.num_exits - 1] * 2]
    for row, index in enumerate(answer.exit_index.tolist()):
        torch.testing.assert_close(answer.logits[row], logits[index][row])


EXPORTED = [pytest.param(name, marks=[] if name == "torchvision-resnet18" else pytest.mark.slow) for name in MODULES]


@pytest.mark.parametrize("name", EXPORTED)
def test_the_export_equals_pytorch(name, tmp_path):
    """It compares itself stage by stage before it is put in place."""
    from hf_scan.runtime import ORTScanForImageClassification

    model = ScanForImageClassification.from_module(trained(name), image_size=SIZE, preprocessing=PREPARED).eval()
    model.export_onnx(tmp_path / "onnx")
    assert ORTScanForImageClassification.from_pretrained(tmp_path / "onnx").num_exits == model.num_exits


@pytest.mark.parametrize("name", ["sequential", "transformers-vit"])
def test_a_training_step_and_thresholds(name, tmp_path):
    model = ScanForImageClassification.from_module(trained(name), image_size=SIZE, preprocessing=PREPARED)
    rows = [{"pixel_values": torch.randn(3, SIZE, SIZE), "labels": index % 7} for index in range(60)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = {"max_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    arguments = ScanTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=8, **settings)
    ScanTrainer(model, arguments, train_dataset=rows).train()
    changed = [key for key, value in model.state_dict().items() if not torch.equal(before[key], value)]
    assert any(key.startswith("backbone.") for key in changed)
    assert any(key.startswith("exit_heads.") for key in changed)
    others = [{"pixel_values": torch.randn(3, SIZE, SIZE), "labels": index % 7} for index in range(60)]
    found = calibrate(model.eval(), others, max_accuracy_drop=50, fallback="deepest")
    assert isinstance(found, ExitConfig)
    assert len(found.thresholds) == model.num_exits - 1


def test_a_network_that_cannot_be_saved_is_refused_before_a_training_that_saves(tmp_path):
    model = ScanForImageClassification.from_module(sequential(), image_size=32, preprocessing=PREPARED)
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": 0}] * 8
    arguments = ScanTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"a Sequential, a module of its own .*is 'steps'; expected 'no'"):
        ScanTrainer(model, arguments, train_dataset=rows)


def test_a_model_of_timm_goes_the_way_of_timm():
    plain = timm.create_model("test_resnet", num_classes=7)
    model = ScanForImageClassification.from_module(plain, exit_points=["layer2"])
    assert (model.config.backbone_source, model.config.exit_points) == ("timm", ["layer2"])


def test_exits_stand_after_any_block():
    plain = trained("transformers-vit")
    model = ScanForImageClassification.from_module(
        plain,
        preprocessing=PREPARED,
        exit_points=[
            "vit.layers.3",
        ],
    )
    assert (model.config.exit_points, model.config.image_size) == (["vit.layers.3"], 64)
    points = ["layer2.0", "layer4.0"]
    resnet = ScanForImageClassification.from_module(
        trained("torchvision-resnet18"), image_size=32, preprocessing=PREPARED, exit_points=points
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(resnet(images).logits, resnet.backbone(images))


def test_arguments_that_made_a_torchvision_network(tmp_path):
    plain = torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=7)
    model = ScanForImageClassification.from_module(
        plain, image_size=32, preprocessing=PREPARED, backbone="mobilenet_v2", backbone_kwargs={"width_mult": 0.25}
    )
    assert (model.config.backbone_source, model.config.backbone) == ("torchvision", "mobilenet_v2")
    with pytest.raises(ValueError, match=r"not what torchvision makes of 'mobilenet_v2' with {'width_mult': 0.5}"):
        ScanForImageClassification.from_module(
            plain, image_size=32, preprocessing=PREPARED, backbone="mobilenet_v2", backbone_kwargs={"width_mult": 0.5}
        )


class _Wrong(nn.Module):
    """A network with something odd between its map and its classifier."""

    def __init__(self, odd) -> None:
        super().__init__()
        self.block, self.last = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 7)
        self.odd = odd

    def forward(self, image):
        return self.odd(self, self.last(self.block(image)))


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (
            lambda self, x: self.fc(x.mean((2, 3))) if x.sum() > 0 else x,
            r"it decides by what it computes .*, in line \d+ of test_module_conversion\.py: `.*x\.sum\(\) > 0",
        ),
        (lambda self, x: x, r"has no classifier: .* it returns \(2, 4, 16, 16\); expected logits"),
        (lambda self, x: (self.fc(x.mean((2, 3))), x), "does not return one tensor; expected logits alone"),
        (lambda self, x: {"logits": self.fc(x.mean((2, 3)))}, r"returns \['logits'\], not one tensor"),
    ],
)
def test_modules_that_are_no_classifiers(odd, message):
    with pytest.raises(ValueError, match=f"_Wrong .*{message}"):
        ScanForImageClassification.from_module(_Wrong(odd), image_size=16, preprocessing=PREPARED)


def test_bad_arguments(caplog):
    plain = sequential()
    swin = Swinv2ForImageClassification(
        Swinv2Config(image_size=32, embed_dim=8, depths=[1], num_heads=[1], window_size=4)
    )
    with pytest.raises(ValueError, match="`num_labels` is 5, and Sequential answers with 7"):
        ScanForImageClassification.from_module(plain, image_size=32, num_labels=5, preprocessing=PREPARED)
    with pytest.raises(ValueError, match=r"`id2label` names 2 labels, and Sequential answers with 7"):
        ScanForImageClassification.from_module(plain, image_size=32, id2label={0: "a", 1: "b"}, preprocessing=PREPARED)
    with pytest.raises(ValueError, match="Sequential does not say which images it was made for; expected"):
        ScanForImageClassification.from_module(plain, preprocessing=PREPARED)
    with pytest.raises(ValueError, match="`module` is a str; expected a"):
        ScanForImageClassification.from_module("resnet18", image_size=32)
    with pytest.raises(ValueError, match=r"`exit_points` holds '3', which Sequential runs 0 times"):
        ScanForImageClassification.from_module(plain, image_size=32, preprocessing=PREPARED, exit_points=["3"])
    with pytest.raises(ValueError, match=r"Swinv2ForImageClassification of Transformers; expected one of"):
        ScanForImageClassification.from_module(swin, preprocessing=PREPARED)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        ScanForImageClassification.from_module(plain, image_size=32)
    finally:
        logger.removeHandler(caplog.handler)
    assert "`preprocessing` is not given: images are taken to be prepared with ImageNet's" in caplog.text


def test_preprocessing_is_read_from_what_prepares_images():
    weights = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    model = ScanForImageClassification.from_module(sequential(), image_size=32, preprocessing=weights)
    assert model.config.preprocessing["mean"] == [0.485, 0.456, 0.406]
    assert model.config.preprocessing["crop_pct"] == pytest.approx(224 / 256)
    assert model.config.preprocessing["interpolation"] == "bilinear"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone_source": "pickle"}, "backbone_source"),
        ({"backbone_source": "custom"}, r"no configuration can make\. Convert"),
        ({"backbone": "bert"}, r"'bert', which is no family of Transformers' classifiers"),
        ({"backbone": "org/code"}, "no family of Transformers' classifiers"),
        (
            {"backbone_kwargs": {"auto_map": {"AutoConfig": "org/code--x.Y"}}},
            r"`backbone_kwargs` names \['auto_map'\]",
        ),
        ({"backbone_kwargs": {"_attn_implementation": "org/kernel"}}, r"`backbone_kwargs` names"),
        ({"backbone_kwargs": {"hidden_act": "org/act"}}, r"'hidden_act' as 'org/act'; expected an activation"),
        ({"backbone_kwargs": {"depths": [1, 10**9]}}, r"'depths' \[1, 1000000000\], more than 2048 in all"),
        ({"backbone_kwargs": {"hidden_sizes": [60000] * 4}}, "numbers that its weights do not hold|another shape"),
        ({"backbone_source": "torchvision"}, r"`backbone` is 'resnet', which this version of torchvision does not"),
        ({"backbone_source": "torchvision", "backbone": "../x"}, "expected the name of a classifier of torchvision"),
        (
            {"backbone_source": "torchvision", "backbone": "resnet18", "backbone_kwargs": {"weights": "DEFAULT"}},
            r"`backbone_kwargs` names \['weights'\], which would make torchvision fetch weights",
        ),
        (
            {"backbone_source": "torchvision", "backbone": "resnet18", "backbone_kwargs": {"pretrained": True}},
            r"`backbone_kwargs` names \['pretrained'\]",
        ),
    ],
)
def test_hostile_configurations_are_refused(changes, message, tmp_path_factory, monkeypatch):
    """Nothing is fetched, and nothing is built but what is on the lists."""
    folder = tmp_path_factory.mktemp("hostile")
    name = "transformers-resnet"
    model = ScanForImageClassification.from_module(trained(name), image_size=SIZE, preprocessing=PREPARED)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if "backbone_source" in changes and "backbone_kwargs" not in changes:
        changes = {**changes, "backbone_kwargs": {}}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *args, **kwargs: pytest.fail("a download"))
    with pytest.raises((ValueError, RuntimeError), match=message):
        ScanForImageClassification.from_pretrained(folder)


def test_a_configuration_makes_a_network_of_each_source():
    for source, name, kwargs in (
        ("torchvision", "resnet18", {}),
        ("transformers", "convnext", {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}),
    ):
        config = ScanConfig(
            backbone_source=source, backbone=name, backbone_kwargs=kwargs, image_size=SIZE, num_labels=3
        )
        with torch.device("meta"):
            assert ScanForImageClassification(config).num_exits == 4
