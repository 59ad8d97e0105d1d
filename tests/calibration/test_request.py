import numpy as np
import pytest

from hf_scan import ExitConfig, RiskBound, calibrate, certify_thresholds

from .samples import table


def test_settings_of_the_genetic_search_are_not_ignored(network, tables):
    with pytest.raises(TypeError, match=r"\['beta'\] are for the genetic search"):
        calibrate(network, tables[0], max_accuracy_drop=1.0, beta=0.5)
    with pytest.raises(TypeError, match=r"`calibrate` has no arguments \['max_drop'\]"):
        calibrate(network, [], max_drop=0.5)  # before the images are looked at


def test_p95_is_for_single_images(network, tables):
    with pytest.raises(ValueError, match="is for single images"):
        calibrate(network, tables[0], max_latency_ms=5.0, latency="p95", batch_size=8)


def test_images_that_searched_do_not_certify_what_was_rounded(network, tables):
    """The thresholds are others then, and what they were found on is remembered all the same."""
    config = calibrate(network, tables[0], max_accuracy_drop=5.0)
    network.exit_config = config.replace(thresholds=[t and round(t, 2) for t in config.thresholds])
    assert network.exit_config.search is None
    with pytest.raises(ValueError, match="The thresholds were searched on the 'search' split"):
        certify_thresholds(network, tables[0], RiskBound(9.0))
    network.exit_config = ExitConfig()


def test_no_split_takes_both_parts_in_turn(network, tables):
    search, certification = tables
    network.exit_config = calibrate(network, search, guarantee=RiskBound(5.0), certify_dataset=certification)
    with pytest.raises(ValueError, match="certified the thresholds that the model has"):
        calibrate(network, certification, max_accuracy_drop=5.0)
    with pytest.raises(ValueError, match="Thresholds were searched on the 'search' split"):
        calibrate(network, table(500, 7, model=search.model), guarantee=RiskBound(5.0), certify_dataset=search)
    twice = certification.select(np.r_[np.arange(3000), np.arange(3000)])
    with pytest.raises(ValueError, match="certified the thresholds that the model has"):
        calibrate(network, twice, max_accuracy_drop=5.0)
    # Anew, with the parts as they were.
    calibrate(network, search, guarantee=RiskBound(6.0), certify_dataset=certification)
    network.exit_config = ExitConfig()


@pytest.mark.parametrize(
    ("targets", "kind", "message"),
    [
        ({"guarantee": 1.0}, TypeError, "The guarantee is 1.0; expected a `RiskBound`"),
        ({"max_accuracy_drop": "0.5"}, TypeError, "`max_accuracy_drop` is '0.5'; expected a number"),
        ({"max_accuracy_drop": 1.0, "temperatures": [1.0]}, ValueError, "`temperatures` holds 1 numbers"),
        (
            {"max_accuracy_drop": 1.0, "criterion": lambda seen: -seen[-1].abs().amax(dim=-1)},
            ValueError,
            "gives scores from -.* expected scores in .0, 1., as thresholds are",
        ),
    ],
)
def test_targets_of_the_wrong_kind(network, tables, targets, kind, message):
    with pytest.raises(kind, match=message):
        calibrate(network, tables[0], **targets)


@pytest.mark.parametrize("batch_size", [0, -1, None])
def test_batch_sizes_that_are_none(network, tables, batch_size):
    with pytest.raises(ValueError, match=f"`batch_size` is {batch_size}; expected"):
        calibrate(network, tables[0], speedup=1.1, batch_size=batch_size)
