import pytest

from hf_scan import calibrate


@pytest.mark.parametrize("batch_size", [0, -1, None])
def test_batch_sizes_that_are_none(network, tables, batch_size):
    with pytest.raises(ValueError, match=f"`batch_size` is {batch_size}; expected"):
        calibrate(network, tables[0], speedup=1.1, batch_size=batch_size)
