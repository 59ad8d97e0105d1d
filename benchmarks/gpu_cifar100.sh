#!/usr/bin/env bash
# CIFAR-100 on one GPU, from nothing to rows for the README: the fast recipe with exits, and its plain twin, for each
# seed, in under nine minutes on a data-centre GPU. Images are held and augmented on the device.
#
#     benchmarks/gpu_cifar100.sh [DATASET] [FOLDER] [more flags of examples/train.py]
#
# DATASET is a name on the Hub or a folder, `uoft-cs/cifar100` unless given; runs go into FOLDER, `runs/gpu_cifar100`.
# A run that is complete is not run again, and one that was interrupted goes on from its last epoch: start the script
# again after a time limit. SEEDS ("0 1"), RECIPES ("cifar100_fast_resnet18"), EPOCHS (30) and MINUTES (9) may be set
# in the environment.
set -euo pipefail
dataset=${1:-uoft-cs/cifar100}
folder=${2:-runs/gpu_cifar100}
shift $(($# < 2 ? $# : 2))
python=${PYTHON:-python}
root=$(cd "$(dirname "$0")/.." && pwd)
end=$((SECONDS + 60 * ${MINUTES:-9}))

train() { # name, then flags
    local output="$folder/$1"
    shift
    if [[ -f "$output/metrics.json" ]]; then
        echo "$output is complete."
        return
    fi
    local resume=()
    if compgen -G "$output/checkpoint-*" >/dev/null; then
        resume=(--resume_from_checkpoint last)
    fi
    local left=$((end - SECONDS))
    if ((left <= 0)) || ! timeout "$left" "$python" "$root/examples/train.py" "$@" "${resume[@]}" --output_dir "$output"; then
        echo "$output is not complete. Start this script again to go on." >&2
        exit 1
    fi
}

for recipe in ${RECIPES:-cifar100_fast_resnet18}; do
    for seed in ${SEEDS:-0 1}; do
        shared=("$root/examples/recipes/$recipe.yaml" --dataset_name "$dataset" --num_train_epochs "${EPOCHS:-30}"
            --seed "$seed" --holdout 0.1 --disable_tqdm true "$@")
        train "${recipe}_plain_$seed" "${shared[@]}" --plain
        train "${recipe}_exits_$seed" "${shared[@]}" --distillation_preset best \
            --plain_metrics "$folder/${recipe}_plain_$seed/metrics.json"
    done
done
