"""Which criteria fit a network that gives one label an image, and one that gives several."""

import pytest

from hf_scan import ExitConfig
from hf_scan.model.problem_type import MULTI_LABEL, for_problem

from ..conftest import random_scan_model


@pytest.fixture(scope="module")
def several():
    return random_scan_model(problem_type=MULTI_LABEL)


def test_a_criterion_that_compares_classes_is_refused(several, model, images):
    assert several.exit_config.criterion == "label_confidence"
    for criterion in ("confidence", "margin", lambda seen: seen[-1].amax(dim=-1)):
        with pytest.raises(ValueError, match=r"expected 'label_confidence', as others compare classes"):
            several.exit_config = ExitConfig([0.5, 0.5], criterion)
    with pytest.raises(ValueError, match="expected 'label_confidence'"):
        several.predict_adaptive(images, exit_config=ExitConfig([0.5, 0.5]))
    for call in (model.predict_adaptive, lambda *args, **kwargs: list(model.predict_adaptive_stream(*args, **kwargs))):
        with pytest.raises(ValueError, match="expected one for a single label an image"):
            call(images, thresholds=[0.5, 0.5], criterion="label_confidence")


def test_a_configuration_that_fits_is_the_same_object():
    one, several = ExitConfig(thresholds=[0.5]), ExitConfig(thresholds=[0.5], criterion="label_confidence")
    assert for_problem(one, None) is one
    assert for_problem(several, MULTI_LABEL) is several
    assert for_problem(ExitConfig(), MULTI_LABEL) == ExitConfig(criterion="label_confidence")
