"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
import pkgutil
import re

import pytest

import hf_scan


MODULES = [name for _, name, _ in pkgutil.walk_packages(hf_scan.__path__, "hf_scan.")]


class FencedParser(doctest.DocTestParser):
    """Without the Markdown fences, the last of which would count as output."""

    def parse(self, string, name="<string>"):
        return super().parse(re.sub(r"^ *```.*$", "", string, flags=re.MULTILINE), name)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(parser=FencedParser()).find(module, name):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_there_are_examples():
    tests = [
        test
        for name in MODULES
        for test in doctest.DocTestFinder(parser=FencedParser()).find(importlib.import_module(name), name)
        if test.examples
    ]
    assert len(tests) >= 9
