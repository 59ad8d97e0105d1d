"""Arguments that are refused, and presets."""

import pytest

from hf_scan import ScanTrainer

from ..conftest import random_scan_model
from .samples import arguments


@pytest.mark.parametrize("setting", [{"neftune_noise_alpha": 5.0}, {"use_liger_kernel": True}])
def test_settings_of_language_models(tmp_path, setting):
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}` is for language models"):
        arguments(tmp_path, **setting)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_weight", -1.0),
        ("soft_label_weight", float("nan")),
        ("hint_weight", -1e-9),
        ("distillation_temperature", 0.0),
        ("distillation_temperature", float("inf")),
        ("label_weight", float("inf")),
        ("mixup_alpha", float("nan")),
        ("cutmix_alpha", float("inf")),
        ("distillation_warmup_steps", float("nan")),
        ("label_smoothing_factor", -0.1),
        ("label_smoothing_factor", float("nan")),
    ],
)
def test_bad_weights(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value}; expected (a number|numbers)"):
        arguments(tmp_path, **{name: value})


def test_presets_and_what_is_given_in_their_place(tmp_path):
    args = arguments(tmp_path)
    assert (args.label_weight, args.soft_label_weight, args.hint_weight) == ([0.5], [0.5], [6.4e-5])
    args = arguments(tmp_path, distillation_preset="successor", label_weight=0.9)
    assert (args.label_weight, args.soft_label_weight, args.hint_weight) == ([0.9], [0.3], [0.0])
    assert not args.scale_by_temperature
    assert (args.distillation_teacher, args.distillation_warmup_steps) == ("deepest", 0)
    args = arguments(tmp_path, distillation_preset="best", distillation_warmup_steps=0.5)
    assert (args.distillation_teacher, args.distillation_warmup_steps) == ("ensemble", 0.5)
    with pytest.raises(ValueError, match=r"`distillation_preset` is 'worst'; expected one of \['best', 'paper', "):
        arguments(tmp_path, distillation_preset="worst")
    with pytest.raises(ValueError, match=r"`soft_label_weight` is .*, 5 weights; the network has 3 exits"):
        ScanTrainer(random_scan_model(), arguments(tmp_path, soft_label_weight=[0.1] * 5))


@pytest.mark.parametrize("name", ["mixup_alpha", "cutmix_alpha", "distillation_warmup_steps"])
def test_bad_numbers(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` is -1.0; expected a number"):
        arguments(tmp_path, **{name: -1.0})
