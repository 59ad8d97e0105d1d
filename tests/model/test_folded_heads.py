"""Heads as bare calls: the same answers, with fewer operators."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_scan.model.exit_heads import ExitHead
from hf_scan.model.folded_heads import FoldedHead


@pytest.mark.parametrize("attention_type", ["conv", "separable", "nearest", "none"])
@pytest.mark.parametrize("classifier_type", ["conv", "separable", "chain"])
@pytest.mark.parametrize("size", [16, 13])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_folded_head_answers_alike(attention_type, classifier_type, size, batch_size):
    head = random_head(attention_type, classifier_type)
    feature = torch.randn(batch_size, 16, size, size)
    for ours, theirs in zip(FoldedHead(head)(feature), head(feature)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_folded_head_makes_fewer_calls():
    """No batch norm, and for one image a convolution less wherever a depthwise and a pointwise one follow each other:
    twice in the attention and once in the classifier. Wide heads stay as they are."""

    def calls(head, batch_size):
        with OperatorCounter() as counter:
            head(torch.randn(batch_size, 16, 16, 16))
        return counter.counts["convolution"], counter.counts["native_batch_norm"]

    for head_width, single in ((32, 5), (512, 8)):
        head = random_head("separable", "separable", head_width)
        assert calls(head, 1) == calls(head, 2) == (8, 4)
        assert calls(FoldedHead(head), 2) == (8, 0)
        assert calls(FoldedHead(head), 1) == (single, 0)


class OperatorCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def random_head(attention_type, classifier_type, head_width=32):
    head = ExitHead(16, 4, 96, 10, attention_type, classifier_type, head_width)
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                torch.nn.init.uniform_(values, 0.5, 2.0)
    return head.eval()
