"""Train a SCAN classifier on any image classification dataset, find its thresholds, test it, and save it.

    python examples/train.py examples/recipes/cifar100_resnet20.yaml --output_dir runs/cifar100
    python examples/train.py --dataset_name food101 --backbone resnet50 --crop resized --output_dir runs/food101
    python examples/train.py examples/recipes/cifar100_resnet20.yaml --output_dir runs/cifar100_plain --plain
    accelerate launch examples/train.py examples/recipes/cifar100_resnet20.yaml --output_dir runs/cifar100
    torchrun --nproc_per_node 2 examples/train.py examples/recipes/cifar100_resnet20.yaml --use_cpu ...

A recipe is a YAML file of flags; it can include another. Flags after it win. All flags of `TrainingArguments` are
there. `--plain` trains the backbone without exits by the same recipe, from the same initial weights; the other run
shows its accuracy beside its own when it is told where that is: `--plain_metrics runs/cifar100_plain/metrics.json`.
`--push_to_hub --hub_model_id org/name` pushes the folder, and checkpoints on the way; the token is that of `hf auth
login` or `HF_TOKEN`.
"""

import sys

from accelerate import PartialState

from hf_scan.workflows.recipes import parse_arguments
from hf_scan.workflows.train_run import run_training


if __name__ == "__main__":
    run_training(*parse_arguments(sys.argv[1:], description=__doc__.splitlines()[0]))
    # A process that leaves while another is still at work can be aborted on its way out.
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
