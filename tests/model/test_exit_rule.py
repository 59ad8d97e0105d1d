import numpy as np
import pytest

from hf_scan.calibration import (
    answering_column,
)


def test_answering_column_by_hand():
    confidences = np.array([[0.9, 0.2, 0.0], [0.5, 0.8, 0.0], [0.5, 0.5, 0.0]])
    assert answering_column(confidences, [0.7, 0.7]).tolist() == [0, 1, 2]
    assert answering_column(confidences, [0.5, 0.5]).tolist() == [0, 1, 2]  # above, not at
    assert answering_column(confidences, [None, 0.1]).tolist() == [1, 1, 1]
    many = answering_column(confidences, np.array([[0.7, 0.7], [0.0, 0.0], [1.0, 1.0]]))
    assert many.tolist() == [[0, 1, 2], [0, 0, 0], [2, 2, 2]]
    with pytest.raises(ValueError, match="There are 1 thresholds for 3 columns"):
        answering_column(confidences, [0.5])
