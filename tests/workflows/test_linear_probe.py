import torch

from hf_scan import ScanConfig, ScanForImageClassification
from hf_scan.workflows.linear_probe import fit_classifier

from ..conftest import random_scan_model


def bright_and_dark(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    labels = [index % 3 for index in range(count)]
    return [{"pixel_values": image + 2 * label, "labels": label} for image, label in zip(images, labels)]


def test_only_the_classifier_changes_and_it_learns():
    model = random_scan_model(num_labels=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = bright_and_dark(90)
    held_out = fit_classifier(model, images)
    assert held_out > 0.9
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"backbone.fc.weight", "backbone.fc.bias"}
    pixels = torch.stack([row["pixel_values"] for row in images])
    answers = model(pixels).logits.argmax(-1)
    assert (answers == torch.tensor([row["labels"] for row in images])).float().mean() > 0.9


def test_the_answers_do_not_depend_on_how_large_features_are():
    """A layer before that is scaled is scaled back: the fit works on normalised features."""
    images = bright_and_dark(60)
    logits = []
    for scale in (1.0, 1000.0):
        model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=3, image_size=16)).eval()
        torch.manual_seed(0)
        for parameter in model.backbone.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        model.backbone.layer3[2].bn2.weight.data.fill_(scale)
        model.backbone.layer3[2].bn2.bias.data.zero_()
        fit_classifier(model, images)
        logits.append(model(torch.stack([row["pixel_values"] for row in images])).logits)
    assert (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean() > 0.9
