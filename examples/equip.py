"""Make a trained classifier faster, from its weights and a folder of images.

    python examples/equip.py --model tf_efficientnet_lite0 --weights lite0.safetensors --data photos \
        --max_accuracy_drop 0.5 --output runs/faster

The same as `hf-scan equip`, which explains the flags with `--help`. A run that was interrupted goes on where it
stopped when it is started again.
"""

import sys

from transformers import HfArgumentParser

from hf_scan.workflows.equip import run_equip
from hf_scan.workflows.equip_arguments import EquipArguments


if __name__ == "__main__":
    parser = HfArgumentParser(EquipArguments, description=__doc__.splitlines()[0])
    (arguments,) = parser.parse_args_into_dataclasses(sys.argv[1:], look_for_args_file=False)
    print(f"\n{run_equip(arguments)}")
