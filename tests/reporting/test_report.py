import json

import pytest
from huggingface_hub import ModelCard

from hf_scan import ExitConfig
from hf_scan.costs import ExitCosts, MeasuredCosts, RealisedSpeedup, count_macs
from hf_scan.reporting.model_card import create_model_card
from hf_scan.reporting.report import exit_report, exit_table, speedup_lines

from ..conftest import random_scan_model


SCORES = {
    "exit_0_accuracy": 0.5,
    "exit_1_accuracy": 0.6,
    "exit_2_accuracy": 0.7,
    "ensemble_accuracy": 0.75,
    "adaptive_accuracy": 0.65,
    "exit_0_share": 0.5,
    "exit_1_share": 0.2,
    "exit_2_share": 0.2,
    "ensemble_share": 0.1,
    "mean_cost": 0.625,
}
SPEEDUPS = [
    RealisedSpeedup(8, refilled=refilled, plain=4.0, adaptive=2.5, shares=[0.5, 0.0, 0.0, 0.5])
    for refilled in (False, True)
]
# For a batch of 8, and for one image, as slow as half of it.
MILLISECONDS = ExitCosts(stages=[6.0, 8.0, 16.0], heads=[2.0, 8.0, 2.0])
ALONE = ExitCosts(stages=[3.0, 4.0, 8.0], heads=[1.0, 4.0, 1.0])
ZERO = ExitCosts(stages=[0, 0, 0], heads=[0, 0, 0])
COSTS = MeasuredCosts(ZERO, ZERO, {1: ALONE, 8: MILLISECONDS}, {8: ZERO}, {8: 32.0}, dtype="", threads=1, machine="")
FACTS = {"dataset": "letters", "splits": {"train": 10, "search": 4, "test": 6}}


def calibrated():
    model = random_scan_model()
    search = {"method": "genetic", "beta": 0.5, "seed": 0, "n": 4, "split": "search", "fingerprint": "ab" * 32}
    model.exit_config = ExitConfig(thresholds=[0.8, None, 1.0], search=search, costs=COSTS.to_dict())
    return model


def test_report_holds_every_figure_once():
    model = calibrated()
    report = exit_report(model, SCORES, SPEEDUPS, plain_accuracy=0.72)
    assert [row["name"] for row in report["rows"]] == [
        "exit 0 (layer1)",
        "exit 1 (layer2)",
        "exit 2 (layer3)",
        "ensemble",
        "adaptive",
        "plain backbone",
    ]
    macs = count_macs(model)
    assert [row["macs"] for row in report["rows"][:4]] == macs.cumulative(model.exit_config)
    assert report["rows"][4]["macs"] == pytest.approx(0.625 * macs.plain)
    assert report["rows"][5] == {
        "name": "plain backbone",
        "macs": macs.plain,
        "accuracy": 0.72,
        "milliseconds": {"8": 4.0},
    }
    assert report["speedup"] == {
        "predicted from MACs": pytest.approx(1.6),
        # Exit 1 is switched off: (6 + 2) / 8 ms for all, (8 + 16 + 2) / 8 ms for half of them.
        # In a batch that shrinks, the other stages take 13 ms for one of its images and 13/7 for each further one. Of
        # eight, four are expected to be left, and with a chance of 1 to 255 none.
        "predicted from milliseconds, batch 8": pytest.approx(4 / (1 + (13 * 10 / 7 - 13 * 6 / 7 / 2**8) / 8)),
        "realised, batch 8": pytest.approx(1.6),
        "predicted from milliseconds, batch 8, refilled": pytest.approx(4 / (1 + 0.5 * 3.25)),
        "realised, batch 8, refilled": pytest.approx(1.6),
    }
    assert [row["milliseconds"]["8"] for row in report["rows"]] == [1.0, 2.0, 4.25, 4.25, 2.5, 4.0]
    json.dumps(report)


def test_the_table_leaves_out_what_was_not_measured():
    full = exit_table(exit_report(calibrated(), SCORES, SPEEDUPS, plain_accuracy=0.72))
    assert "| ms, batch 8 |" in full
    assert "50.00%" in full
    assert len({len(line) for line in full.splitlines()}) == 1
    bare = exit_table(exit_report(random_scan_model(), {k: v for k, v in SCORES.items() if "accuracy" in k}))
    for word in ("ms", "share", "leave", "adaptive"):
        assert word not in bare
    assert speedup_lines({"speedup": {}}) == []


def test_card_says_what_the_report_says(tmp_path):
    report = exit_report(calibrated(), SCORES, SPEEDUPS, plain_accuracy=0.72)
    create_model_card(calibrated(), report, FACTS, "org/scan-letters").save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"  # else `pipeline` refuses it
    assert card.data.pipeline_tag == "image-classification"
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["Accuracy, adaptive"] == 0.65
    assert results["Accuracy, exit 2 (layer3)"] == 0.7
    assert exit_table(report) in card.text
    for text in ("[0.8, None, 1.0]", "- search: 4 images", 'from_pretrained("org/scan-letters")', "abab"):
        assert text in card.text
    assert "{{" not in card.text


def test_card_without_thresholds_times_or_recipe(tmp_path):
    model = random_scan_model()
    scores = {name: value for name, value in SCORES.items() if name.endswith("accuracy")}
    text = str(create_model_card(model, exit_report(model, scores), FACTS, "org/scan-letters"))
    for heading in ("## Thresholds", "## Recipe", "milliseconds", "speed-up", "seed"):
        assert heading not in text


def test_a_batch_size_without_costs_has_no_prediction():
    other = RealisedSpeedup(3, refilled=False, plain=4.0, adaptive=2.5, shares=[0.5, 0.0, 0.0, 0.5])
    report = exit_report(calibrated(), SCORES, [other])
    assert set(report["speedup"]) == {"predicted from MACs", "realised, batch 3"}
    assert "4.000" in exit_table(report)


def test_what_was_measured_of_the_exits_is_shown_without_a_run_against_the_plain_network():
    """As `examples/calibrate.py` leaves it: the parts were measured, and the whole was not."""
    report = exit_report(calibrated(), SCORES)
    assert "| ms, batch 8 |" in exit_table(report)
    assert [row["milliseconds"].get("8") for row in report["rows"]] == [1.0, 2.0, 4.25, 4.25, None, 4.0]
    card = create_model_card(calibrated(), report, FACTS, "org/net").text
    assert "medians of stages and heads for an exit." in card
    assert "interleaved" not in card


def test_a_card_claims_no_more_than_is_known():
    """Of training, thresholds and splits; and it names the code where there is some."""
    model = random_scan_model()
    bare = create_model_card(model, None, {}, "org/net").text
    for claim in ("self-distillation", "above its threshold.", "predict_adaptive", "disjoint", "trust_remote_code"):
        assert claim not in bare
    own = create_model_card(model, None, {"splits": {"test": 5}}, "org/net", include_code=True).text
    assert "disjoint" not in own  # with what, nobody said
    assert "trust_remote_code=True" in own
    scores = {name: value for name, value in SCORES.items() if name.endswith("accuracy")}
    assert "On the test split." in create_model_card(model, exit_report(model, scores), {}, "org/net").text
    assert "a static network" in create_model_card(model.truncate(0), None, {}, "org/net").text
