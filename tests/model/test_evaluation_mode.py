"""Evaluation mode for a while."""

import pytest
from torch import nn

from hf_scan.model.evaluation_mode import evaluating


def test_each_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(1).eval(), nn.Sequential(nn.Dropout()))
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == before
    assert len(set(before)) == 2


def test_what_has_no_modes_stays_as_it_is():
    engine = object()
    with evaluating(engine):
        pass
