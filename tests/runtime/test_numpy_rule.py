import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_scan import ExitConfig
from hf_scan import apply_exit_rule as torch_rule
from hf_scan.model.exit_criteria import EXIT_CRITERIA
from hf_scan.model.exit_rule import plan_exits
from hf_scan.runtime.numpy_rule import CRITERIA, RULE, ExitSettings, apply_exit_rule, plan_steps

from ..model.test_adaptive import policies, rule_by_hand


@settings(max_examples=150, deadline=None)
@given(policy=policies, n=st.integers(1, 12), labels=st.integers(2, 7), seed=st.integers(0, 2**16))
def test_equals_the_rule_of_pytorch(policy, n, labels, seed):
    rng = np.random.default_rng(seed)
    exit_logits = [rng.normal(scale=2, size=(n, labels)).astype(np.float32) for _ in range(3)]
    _, _, nearest = rule_by_hand([one.astype(np.float64) for one in exit_logits], **policy)
    assume(nearest > 1e-5)  # else two roundings may differ
    expected = torch_rule([torch.from_numpy(one) for one in exit_logits], ExitConfig(**policy))
    found = apply_exit_rule(exit_logits, ExitConfig(**policy))
    assert found.exit_index.tolist() == expected.exit_index.tolist()
    np.testing.assert_allclose(found.logits, expected.logits.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.confidence, expected.confidence.numpy(), rtol=1e-5, atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(policy=policies, max_exit=st.one_of(st.none(), st.integers(0, 2)), every_head=st.booleans())
def test_plans_what_pytorch_plans(policy, max_exit, every_head):
    steps = plan_steps(ExitSettings(**policy), 3, max_exit, every_head)
    expected = plan_exits(ExitConfig(**policy), 3, max_exit, every_head)
    assert [(step.runs, None if step.limit is None else float(step.limit)) for step in steps] == [
        tuple(dataclasses.astuple(step)) if dataclasses.is_dataclass(step) else tuple(step) for step in expected
    ]


def test_has_the_same_criteria_and_fields():
    assert set(CRITERIA) == set(EXIT_CRITERIA)
    names = [entry.name for entry in dataclasses.fields(ExitSettings)]
    assert names == [entry.name for entry in dataclasses.fields(ExitConfig)]
    assert set(RULE) <= set(names)


@pytest.mark.parametrize(
    "values",
    [
        {"thresholds": [0.5, 2.0]},
        {"thresholds": ["0.5"]},
        {"criterion": "luck"},
        {"fallback": "guess"},
        {"temperatures": [0.0]},
    ],
)
def test_settings_are_checked(values):
    with pytest.raises(ValueError, match="expected"):
        ExitSettings(**values)
