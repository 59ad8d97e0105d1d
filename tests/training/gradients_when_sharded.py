"""Run by `test_trainer.py` in two processes: the gradients of a step when PyTorch shards the network (FSDP)."""

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..conftest import random_scan_model


def main() -> None:
    distributed.init_process_group("gloo")
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 5
    whole, sharded = random_scan_model(), random_scan_model()  # in evaluation mode: no statistics of a process's own
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    own = slice(4 * distributed.get_rank(), 4 * distributed.get_rank() + 4)
    whole(images, labels=labels).loss.backward()
    sharded(images[own], labels=labels[own]).loss.backward()
    for (name, one), two in zip(whole.named_parameters(), sharded.parameters()):
        assert two.to_local().numel() < one.numel() or one.numel() == 1 or one.shape[0] == 1, name
        if one.grad is not None:  # the hint's projection is not in this loss
            torch.testing.assert_close(two.grad.full_tensor(), one.grad, rtol=1e-4, atol=1e-4 * float(one.grad.norm()))
    sharded.train()
    sharded(images[own], labels=labels[own]).loss.backward()
    print("the same gradients, and a step in training mode")
    distributed.barrier()  # else the first to end may abort while the other still talks to it
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
