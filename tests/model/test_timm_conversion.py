import pytest
import timm
import torch
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from hf_scan import ScanForImageClassification
from hf_scan.model.image_processing_scan import create_image_processor


def test_from_timm_takes_over_weights_labels_and_preprocessing(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("resnet18.a1_in1k").eval()
    source.pretrained_cfg["crop_pct"] = 0.5  # as a repository of weights may say
    model = ScanForImageClassification.from_timm(source).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images).logits, source(images))
    assert model.config.backbone == "resnet18.a1_in1k"
    assert model.config.id2label[0] == "tench, Tinca tinca"
    assert create_image_processor(model).crop_pct == 0.5
    model.save_pretrained(tmp_path)
    assert create_image_processor(ScanForImageClassification.from_pretrained(tmp_path)).crop_pct == 0.5


@pytest.mark.parametrize(
    "wrapped",
    [
        torch.compile,
        torch.nn.DataParallel,
        lambda model: torch.compile(torch.nn.DataParallel(model)),
    ],
    ids=["compiled", "parallel", "both"],
)
def test_from_timm_looks_into_what_is_around_a_model(wrapped):
    source = timm.create_model("test_resnet", num_classes=3).eval()
    model = ScanForImageClassification.from_timm(wrapped(source)).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images).logits, source(images))


def test_from_timm_takes_a_model_of_transformers():
    source = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=3)).eval()
    images = torch.randn(2, 3, 64, 64)
    model = ScanForImageClassification.from_timm(source).eval()
    assert torch.equal(model(images).logits, source(images).logits)


def test_from_timm_with_other_labels_starts_the_classifier_anew():
    source = timm.create_model("test_resnet", num_classes=6)
    model = ScanForImageClassification.from_timm(source, num_labels=3, exit_points=["layer2"])
    assert model.num_exits == 2
    assert model.backbone.get_classifier().weight.shape[0] == model.config.num_labels == 3
    assert torch.equal(model.backbone.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    by_name = ScanForImageClassification.from_timm("test_resnet", num_labels=3)
    assert by_name.config.num_labels == 3


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        (lambda: "nope", {}, "timm cannot make 'nope'"),
        (lambda: torch.nn.Linear(2, 2), {}, "Linear without timm's `pretrained_cfg`"),
        (lambda: timm.create_model("test_resnet", features_only=True), {}, "FeatureListNet, which returns features"),
        (lambda: timm.create_model("test_vit", features_only=True), {}, "FeatureGetterNet, which returns features"),
        (lambda: timm.create_model("test_resnet"), {"pretrained": True}, "`pretrained` is for a model .* by name"),
        (lambda: timm.create_model("test_resnet", in_chans=1), {}, "size mismatch .* Give the `backbone_kwargs`"),
        (lambda: timm.create_model("test_resnet", act_layer="silu"), {}, "the answers differ. Give the"),
        (lambda: timm.create_model("test_resnet", num_classes=0), {}, "needs at least 2"),
        (lambda: "test_resnet", {"num_labels": 1}, "`num_labels` is 1; .* at least 2"),
    ],
)
def test_from_timm_refuses_what_it_cannot_describe(source, arguments, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ScanForImageClassification.from_timm(source(), **arguments)
