"""Run by `test_trainer.py` in one process and in two: the gradients of one step over the same eight images,
and averages of the weights."""

import sys
from typing import Any

import torch
from accelerate import PartialState
from transformers import set_seed

from hf_scan import EmaCallback, ScanTrainer, ScanTrainingArguments

from ..conftest import random_scan_model
from .samples import rows


def average_weights(output_dir: str, batch_size: int) -> None:
    """Write the averages of a few steps over these images, as one process evaluates and saves them."""
    model = random_scan_model()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: module
    args = ScanTrainingArguments(
        output_dir,
        max_steps=3,
        per_device_train_batch_size=batch_size,
        optim="sgd",
        learning_rate=0.01,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    ScanTrainer(model, args, train_dataset=rows(8), callbacks=[EmaCallback(decay=0.7, use_warmup=False)]).train()
    if args.process_index == 0:
        torch.save(model.state_dict(), f"{output_dir}/averages.pt")


METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "gradient_equilibrium": {"gradient_equilibrium": True},
    "survivor_weighting": {"survivor_weighting": True},
    "ensemble": {"distillation_teacher": "ensemble", "label_smoothing_factor": 0.1},
}


def gradients(output_dir: str, batch_size: int, **method: Any) -> dict[str, torch.Tensor]:
    """Return by how much a step of gradient descent moves each parameter."""
    set_seed(0)
    model = random_scan_model()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # whose statistics are each process's own
            module.train = lambda mode=True, module=module: module
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    args = ScanTrainingArguments(
        output_dir,
        max_steps=1,
        per_device_train_batch_size=batch_size,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **method,
    )
    ScanTrainer(model, args, train_dataset=rows(8)).train()
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}


def main(output_dir: str, expected_processes: int) -> None:
    state = PartialState(cpu=True)
    assert state.num_processes == expected_processes, state.num_processes
    batch_size = 8 // expected_processes
    found = {name: gradients(output_dir, batch_size, **method) for name, method in METHODS.items()}
    if state.is_main_process:
        torch.save(found, f"{output_dir}/gradients.pt")
    average_weights(output_dir, batch_size)
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
