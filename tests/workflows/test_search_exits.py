import copy
import logging

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from hf_scan import ScanConfig, ScanForImageClassification, advise, search_exits
from hf_scan.costs import ExitCosts, count_macs
from hf_scan.data import some_digests
from hf_scan.workflows import search_exits as module
from hf_scan.workflows.candidates import find_candidates, keep_exits, with_candidates
from hf_scan.workflows.part_costs import PartCosts, costs_of_parts
from hf_scan.workflows.search_exits import choose_exits
from hf_scan.workflows.verdict import break_even

from ..conftest import random_scan_model


QUIET = {"use_cpu": True, "disable_tqdm": True, "batch_size": 16}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Two classes of brightness."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(120, 3, 16, 16, generator=generator)
    return [{"pixel_values": image + 2 * (index % 2), "labels": index % 2} for index, image in enumerate(images)]


@pytest.fixture(scope="module")
def found(rows):
    model = random_scan_model(num_labels=2)
    return search_exits(model, rows, max_exits=1, max_accuracy_drop=10, num_epochs=3, **QUIET), model


def test_candidates_are_places_where_the_network_can_be_cut():
    for name in ("cifar_resnet20", "resnet18", "test_convnext", "test_vit", "test_efficientnet"):
        with torch.device("meta"):
            backbone = timm.create_model(name)
            points = find_candidates(backbone).names
            model = ScanForImageClassification(ScanConfig(backbone=name, exit_points=points, num_labels=2))
        assert len(points) == len(set(points)) >= 1
        assert backbone.feature_info[-1]["module"] not in points
        assert model.num_exits == len(points) + 1


def test_every_block_is_a_candidate_or_is_named_with_the_reason():
    with torch.device("meta"):
        found = find_candidates(timm.create_model("resnet50"))
        cait = find_candidates(timm.create_model("cait_xxs24_224"))
    blocks = {f"layer{stage}.{block}" for stage, count in enumerate((3, 4, 6, 3), 1) for block in range(count)}
    assert blocks <= {*found.names, *found.dropped}
    assert found.names[-2:] == ["layer4.0", "layer4.1"]
    assert found.dropped["layer3.5"] == "which ends where 'layer3' does"
    assert found.dropped["act1"] == "whose map is more than 8 times finer than the last one"
    assert found.dropped["layer4.2"] == "behind which only the backbone's own classifier stands"
    assert len(cait.names) == 16
    assert sum(reason == "since 16 are tried, evenly over the depth" for reason in cait.dropped.values()) == 7


def test_heads_are_as_wide_as_if_there_were_few():
    config = random_scan_model(head_feature_size=48).config
    before = copy.deepcopy(config)
    points = ["layer1", "layer2"]
    assert with_candidates(config, 1, points).head_feature_size == 256  # a new head, whatever the old ones were
    few = with_candidates(config, 1, points).head_width
    many = with_candidates(config, 16, points).head_width
    assert len(few) == len(many) == 2
    assert all(one >= other for one, other in zip(few, many))
    assert few != many
    assert config.to_dict() == before.to_dict()


def test_the_backbone_stays_as_it_was(found):
    search, model = found
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(search.model.backbone.state_dict()[name], value)
    assert search.deepest == pytest.approx((search.table.deepest == search.table.labels).mean())


def test_train_and_search_images_are_not_the_same(found):
    search, _ = found
    assert len(search.table) == 24
    remembered = search.model.exit_config.trained_on
    assert remembered.startswith("96: ")
    known = {f"{digest:016x}"[:12] for digest in search.table.samples}
    assert not known & set(remembered.split(": ")[1].split())


def test_what_was_chosen_is_trained_and_can_be_trained_further(found):
    search, _ = found
    assert len(search.exit_points) == 1  # brightness is seen anywhere
    assert search.verdict.answer == "pays"
    assert search.config.exit_points == search.exit_points
    model = search.create_model().eval().to(memory_format=torch.channels_last)  # as the search's network is
    place = search.model.config.exit_points.index(search.exit_points[0])
    pixels = torch.randn(3, 3, 16, 16)
    expected = search.model.eval()(pixels).exit_logits
    answers = model(pixels).exit_logits
    assert torch.equal(answers[0], expected[place])
    assert torch.equal(answers[1], expected[-1])
    assert model.exit_config.trained_on == search.model.exit_config.trained_on
    ScanForImageClassification(search.config)


def test_the_table_and_the_picture(found, tmp_path):
    search, _ = found
    lines = str(search).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == [*search.model.config.exit_points, "plain network"][
        :3
    ]
    assert f"an oracle would reach {search.oracle:.2f}x" in str(search)
    assert str(search.verdict) == lines[-1]
    assert search.oracle >= search.rows[0]["speedup"] * 0.9
    search.plot(tmp_path / "placement.png")
    assert Image.open(tmp_path / "placement.png").width > 300
    assert search.to_dict()["n"] == 24


def test_dear_heads_are_not_chosen(found):
    search, _ = found
    shares = costs_of_parts(search.model).shares
    dear = PartCosts(ExitCosts(shares.stages, [*(2.0 for _ in shares.heads[:-1]), shares.heads[-1]]), "MACs")
    other = choose_exits(search.model, search.table, dear, 4, 10)
    assert other.exit_points == []
    assert other.verdict.answer == "does not pay"
    assert (other.speedup, other.drop) == (1.0, 0.0)
    with pytest.raises(ValueError, match=r"No exit was chosen\. Does not pay"):
        other.create_model()


def test_shares_add_up_to_the_plain_network():
    model = random_scan_model()
    costs = costs_of_parts(model)
    assert costs.shares.plain == pytest.approx(1)
    macs = count_macs(model)
    assert costs.shares.heads[0] == pytest.approx(macs.heads[0] / macs.plain)
    for runtime in ("pytorch", "onnx"):
        measured = costs_of_parts(model, runtime)
        assert measured.shares.plain == pytest.approx(1)
        assert "milliseconds" in measured.unit
        assert PartCosts.from_dict(measured.to_dict()) == measured
    with pytest.raises(ValueError, match="`runtime` is 'tensorrt'"):
        costs_of_parts(model, "tensorrt")


def test_keeping_exits_keeps_answers():
    model = random_scan_model(exit_points=["layer1", "layer2"], head_width=[64, 64])
    small = keep_exits(model, ["layer2"])
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(small(pixels).exit_logits[0], model(pixels).exit_logits[1])
    assert not small.training


def test_bad_requests(rows):
    model = random_scan_model(num_labels=2)
    with pytest.raises(ValueError, match="`max_exits` is 0"):
        search_exits(model, rows, max_exits=0)
    with pytest.raises(ValueError, match="`max_accuracy_drop` is -1"):
        search_exits(model, rows, max_accuracy_drop=-1)
    with pytest.raises(ValueError, match="There are 4 images to search on; expected at least 10"):
        search_exits(model, rows[:20])
    with pytest.raises(ValueError, match=r"has the splits .* and no 'search'"):
        search_exits(model, {"train": rows})
    with pytest.raises(ValueError, match="`holdout` is 2"):
        search_exits(model, rows, holdout=2)


def test_images_that_the_network_or_its_heads_see_are_refused_before_training(rows, monkeypatch):
    monkeypatch.setattr(module, "train_candidates", lambda *_, **__: pytest.fail("trains"))
    model = random_scan_model(num_labels=2)
    with pytest.raises(ValueError, match="Heads would be trained on the 'search' split, or a part of it: 120 images"):
        search_exits(model, {"train": rows, "search": rows})
    model.exit_config = model.exit_config.replace(trained_on=some_digests(rows))
    with pytest.raises(ValueError, match=r"The network was trained on the 'search' split.* Use other images, such as"):
        search_exits(model, rows)


def test_too_few_images_for_the_target_are_named(rows, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_scan"), "propagate", True)
    search_exits(random_scan_model(num_labels=2), rows, max_accuracy_drop=0.5, num_epochs=0.1, **QUIET)
    assert "one of 24 images to search on is 4.17 points" in caplog.text
    assert "200 images are the least" in caplog.text


def test_advice_is_of_costs_alone():
    model = random_scan_model()
    advice = advise(model, runtime="macs", exit_points=["layer1", "layer2"])
    with_exits = ScanForImageClassification(with_candidates(model.config, 4, ["layer1", "layer2"]))
    macs = count_macs(with_exits)
    first = (macs.stages[0] + macs.heads[0]) / macs.plain
    second = (macs.stages[0] + macs.stages[1] + macs.heads[1]) / macs.plain  # without the head before
    assert [row["cost"] for row in advice.rows] == pytest.approx([first, second])
    assert advice.rows[0]["break_even"] == pytest.approx(break_even(first, macs.heads[0] / macs.plain))
    assert advice.bound == pytest.approx(1 / first)
    assert str(advice).splitlines()[-1] == str(advice.verdict)
    assert advice.to_dict()["verdict"]["answer"] == advice.verdict.answer
    with pytest.raises(ValueError, match=r"\['image_size'\] are for a network that is given by name"):
        advise(model, image_size=16)
    with pytest.raises(ValueError, match="`max_exits` is 0"):
        advise(model, max_exits=0)
    with pytest.raises(ValueError, match="`backbone` is 'resnet_of_dreams'"):
        advise("resnet_of_dreams")


def test_networks_of_other_libraries_are_advised_on():
    advice = advise("torchvision/resnet18", exit_points=["layer2", "layer3.0"], runtime="macs", image_size=64)
    assert [row["name"] for row in advice.rows] == ["layer2", "layer3.0"]
    assert 1 < advice.bound < 4


def test_exits_are_sought_in_a_module_of_ones_own(rows, tmp_path):
    def block(channels, wider):
        return nn.Sequential(nn.Conv2d(channels, wider, 3, 2, 1), nn.BatchNorm2d(wider), nn.ReLU())

    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    plain = nn.Sequential(block(3, 8), block(8, 8), *pooled)
    model = ScanForImageClassification.from_module(
        plain, image_size=16, preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3}
    )
    settings = {"max_exits": 1, "max_accuracy_drop": 50, "num_epochs": 1, "output_dir": tmp_path / "search"}
    found = search_exits(model, rows, **settings, **QUIET)
    assert [path.name for path in (tmp_path / "search").iterdir()] == ["search.json"]  # no checkpoint can be saved
    assert [row["name"] for row in found.rows] == ["0"]
    assert torch.equal(found.model.backbone[0][0].weight, plain[0][0].weight)
