import logging

import pytest

from ..conftest import random_scan_model
from .samples import table


@pytest.fixture(scope="module")
def network():
    return random_scan_model()


@pytest.fixture
def tables(network):
    """To search and to certify on, of the network."""
    return table(model=network.fingerprint()), table(3000, 1, "certify", network.fingerprint())


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What the package logs, which Transformers does not hand on by itself."""
    monkeypatch.setattr(logging.getLogger("hf_scan"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog
