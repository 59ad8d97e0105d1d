"""Find the thresholds of a trained network for what you may lose or spend, test them, and write them beside it.

    python examples/calibrate.py --model runs/cifar100 --dataset_name uoft-cs/cifar100 --image_column img \
        --label_column fine_label --max_accuracy_drop 0.5
    python examples/calibrate.py --model runs/cifar100 ... --max_latency_ms 3 --latency p95
    python examples/calibrate.py --model runs/cifar100 ... --guarantee 1.0 --delta 0.05
    python examples/calibrate.py --model runs/cifar100 ... --speedup 2 --exit_config_name exit_config_fast.json

`--model` is a folder, such as `examples/train.py` writes, or a repository on the Hub. Thresholds are found on the
images that training kept for that (`--holdout`, with the seed of the run); a guarantee takes half of them. Costs are
milliseconds, measured here first; `--no_measure` counts MACs, unless the network was measured before. The test split
chooses nothing.

Writes the exit configuration, `frontier.png`, `exits.png` and `reliability.png`, and, for the network's own
`exit_config.json`, its card and `metrics.json` anew.
"""

import sys

from hf_scan.workflows.calibrate_run import parse_calibration_arguments, run_calibration


if __name__ == "__main__":
    run_calibration(*parse_calibration_arguments(sys.argv[1:], description=__doc__.splitlines()[0]))
