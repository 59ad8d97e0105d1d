import pytest
from transformers.utils import logging


@pytest.fixture
def warnings_of_transformers(caplog):
    """What Transformers' logger says, which does not reach the root logger by itself."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()
