import pytest

from hf_scan import ExitConfig
from hf_scan.costs import (
    ExitCosts,
    MeasuredCosts,
    predicted_speedup,
)


def test_cumulative_costs_count_the_heads_that_ran():
    costs = ExitCosts(stages=[100, 200, 300], heads=[10, 20, 5])
    assert costs.plain == 605
    assert costs.cumulative() == [110, 330, 635, 635]
    assert costs.cumulative(ExitConfig(thresholds=[None, 0.5])) == [100, 320, 625, 625]
    # With the deepest exit as fallback, a head that lets nothing go does not run.
    assert costs.cumulative(ExitConfig(thresholds=[1.0, 0.5], fallback="deepest")) == [100, 320, 625, 625]
    assert costs.cumulative(ExitConfig(thresholds=[1.0, 0.5])) == [110, 330, 635, 635]
    assert costs.relative()[0] == pytest.approx(110 / 605)


def by_hand(milliseconds, plain):
    counted = ExitCosts(stages=[1, 1], heads=[1, 1])
    return MeasuredCosts(counted, counted, milliseconds, milliseconds, plain, dtype="", threads=1, machine="")


def test_what_is_expected_of_a_shrinking_batch():
    costs = by_hand(
        {1: ExitCosts([1.0, 3.0], [0.5, 0.25]), 2: ExitCosts([1.6, 4.0], [0.6, 0.3])}, plain={1: 4.2, 2: 5.8}
    )
    shares = [0.75, 0.0, 0.25]
    assert costs.expected_milliseconds(shares, batch_size=1) == pytest.approx(1.5 + 0.25 * 3.25)
    # Of two images, both go on with a chance of 1/16, one with 6/16.
    assert costs.expected_milliseconds(shares) == pytest.approx((2.2 + 6 / 16 * 3.25 + 1 / 16 * 4.3) / 2)
    # Refilled, a quarter of the images costs a quarter of a full batch.
    assert costs.expected_milliseconds(shares, refilled=True) == pytest.approx((2.2 + 0.25 * 4.3) / 2)
    switched_off = ExitConfig(thresholds=[None, 0.5])
    assert costs.expected_milliseconds([0, 0, 1.0], switched_off) == pytest.approx((1.6 + 4.3) / 2)
    assert predicted_speedup(costs, [0, 0, 1.0], switched_off) == pytest.approx(5.8 / 5.9)
    assert predicted_speedup(costs, shares, batch_size=1) == pytest.approx(4.2 / 2.3125)


def test_batch_sizes_and_shares_that_were_not_measured():
    costs = by_hand({1: ExitCosts([1.0, 3.0], [0.5, 0.25])}, plain={1: 4.2})
    with pytest.raises(ValueError, match="`batch_size` is 4, and \\[1\\] were measured"):
        predicted_speedup(costs, [0.5, 0.5, 0.0], batch_size=4)
    for shares in ([0.5, 0.5], [0.5, 0.2, 0.2]):
        with pytest.raises(ValueError, match="expected 3 shares"):
            costs.expected_milliseconds(shares)
