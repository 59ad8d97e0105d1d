# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The command line `hf-scan`: thin commands over the library, each imported when it is asked for."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any


DESCRIPTION = "Early exits that make image classifiers faster."
EPILOG = """\
example:
  hf-scan equip --model resnet50 --weights resnet50.safetensors --data photos --output runs/faster

`hf-scan COMMAND --help` shows the arguments of a command. Errors are one sentence; `--debug` shows where they arose.
`--json` prints the result as one JSON object, and everything else goes to the standard error stream. Exit codes: 0
done, 1 an error that the message explains, 2 wrong usage."""


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run a command.

    Args:
        arguments (`Sequence[str]`, *optional*): The command and its arguments. Defaults to the process's own.

    Returns:
        `int`: the exit code.

    Example:

    ```python
    >>> from hf_scan.cli import main

    >>> main(["predict", "no/such/model", "photo.jpg"])
    1
    ```
    """
    # Before PyTorch is imported: no notice of a CUDA that is there without a GPU.
    os.environ.setdefault("TORCH_LOGS", "-torch.utils.cpp_extension")
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json, debug = "--json" in given, "--debug" in given
    given = [part for part in given if part not in ("--json", "--debug")]
    parser = _main_parser()
    try:
        if not given or given[0] not in COMMANDS:
            parser.parse_args(given)  # ends the process, unless there is no command
            parser.print_usage(sys.stderr)
            return 2
        import_module("hf_scan.registration")
        command = COMMANDS[given[0]][1]
        if not as_json:
            command(given[1:])
            return 0
        with redirect_stdout(sys.stderr):
            result = command(given[1:])
        print(json.dumps(result, indent=2, default=str))
        return 0
    except SystemExit as stop:  # of argparse: 0 for help, 2 for wrong usage
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        print("hf-scan: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError) as error:
        if debug:
            raise
        print(f"hf-scan: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1


def _main_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "hf-scan", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"hf_scan {import_module('hf_scan').__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (description, _) in COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    return parser


def _parser(name: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        f"hf-scan {name}",
        description=COMMANDS[name][0],
        epilog=f"example:\n  hf-scan {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _equip(arguments: list[str]) -> Any:
    equip = import_module("hf_scan.workflows.equip")
    types = import_module("hf_scan.workflows.equip_arguments")
    example = (
        "Example: hf-scan equip --model tf_efficientnet_lite0 --weights lite0.safetensors --data photos "
        "--max-accuracy-drop 0.5 --output runs/faster"
    )
    parser = import_module("transformers").HfArgumentParser(
        types.EquipArguments, prog="hf-scan equip", description=f"{COMMANDS['equip'][0]} {example}"
    )
    (given,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    result = equip.run_equip(given)
    print(f"\n{result}")
    return result.to_dict()


def _advise(arguments: list[str]) -> Any:
    parser = _parser("advise", "--model tf_efficientnet_lite0 --weights lite0.safetensors --data photos")
    parser.add_argument("--model", required=True, help="a model of timm, or 'torchvision/resnet18'")
    parser.add_argument("--data", help="a folder of images, a folder for each class: tries exits on them")
    parser.add_argument("--weights", default="timm", help="with --data, a file (default: the library's own)")
    parser.add_argument("--image-size", type=int, help="pixels (default: the model's)")
    parser.add_argument("--runtime", choices=("pytorch", "onnx", "macs"), default="pytorch", help="what to measure")
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time (default: 1)")
    parser.add_argument("--max-exits", type=int, default=4, help="the most early exits (default: 4)")
    parser.add_argument("--max-accuracy-drop", type=float, default=0.5, help="with --data, points that may be lost")
    parser.add_argument("--epochs", type=float, default=4, help="with --data, epochs that heads are trained")
    given = parser.parse_args(arguments)
    if given.data is None:
        size = {} if given.image_size is None else {"image_size": given.image_size}
        settings = {"max_exits": given.max_exits, "runtime": given.runtime, "batch_size": given.batch_size}
        advice = import_module("hf_scan").advise(given.model, **settings, **size)
    else:
        types = import_module("hf_scan.workflows.equip_arguments")
        with import_module("tempfile").TemporaryDirectory() as folder:
            request = types.EquipArguments(
                model=given.model,
                data=given.data,
                output=folder,
                weights=given.weights,
                image_size=given.image_size,
                runtime=given.runtime,
                serve_batch_size=given.batch_size,
                max_exits=given.max_exits,
                max_accuracy_drop=given.max_accuracy_drop,
                search_epochs=given.epochs,
            )
            return import_module("hf_scan.workflows.equip").place_exits(request).to_dict()
    print(advice)
    return advice.to_dict()


def _train(arguments: list[str]) -> Any:
    recipes, run = import_module("hf_scan.workflows.recipes"), import_module("hf_scan.workflows.train_run")
    example = "Example: hf-scan train --dataset_name photos --backbone resnet18 --output_dir runs/photos"
    parsed = recipes.parse_arguments(arguments, f"{COMMANDS['train'][0]} {example}", "hf-scan train")
    return run.run_training(*parsed)


def _calibrate(arguments: list[str]) -> Any:
    run = import_module("hf_scan.workflows.calibrate_run")
    example = "Example: hf-scan calibrate --model runs/photos --dataset_name photos --max_accuracy_drop 0.5"
    description = f"{COMMANDS['calibrate'][0]} {example}"
    return run.run_calibration(*run.parse_calibration_arguments(arguments, description, "hf-scan calibrate"))


def _measure(arguments: list[str]) -> Any:
    parser = _parser("measure", "runs/photos --batch-size 8 --save")
    parser.add_argument("model", help="a trained network or an export to ONNX: a folder, or a repository on the Hub")
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time (default: 1)")
    parser.add_argument("--threads", type=int, help="threads to compute with (default: the runtime's)")
    parser.add_argument("--rounds", type=int, default=7, help="times that each part is measured (default: 7)")
    parser.add_argument("--save", action="store_true", help="keep the costs in the folder's exit_config.json")
    given = parser.parse_args(arguments)
    if given.save and not Path(given.model).is_dir():
        raise ValueError(f"`--save` writes into a folder, and {given.model!r} is none. Leave it out.")
    costs = import_module("hf_scan.costs")
    costs.keep_freed_memory()
    model = _load(given.model, given.threads)
    if hasattr(model, "parameters"):
        model = model.to(memory_format=import_module("torch").channels_last)
    measured = costs.measure_costs(model, given.batch_size, threads=given.threads, rounds=given.rounds)
    print(import_module("hf_scan.reporting.report").costs_table(measured))
    if given.save:
        model.exit_config.replace(costs=measured).save_pretrained(given.model)
        print(f"Kept in {Path(given.model, 'exit_config.json')}")
    return measured.to_dict()


def _export(arguments: list[str]) -> Any:
    parser = _parser("export", "runs/photos runs/photos-onnx --data photos")
    parser.add_argument("model", help="a trained network: a folder, or a repository on the Hub")
    parser.add_argument("output", help="folder to write to")
    parser.add_argument("--data", help="folder of images, by which the ranges of 8-bit numbers are chosen: adds int8")
    parser.add_argument("--include-preprocessing", action="store_true", help="graphs take images of bytes")
    parser.add_argument("--opset", type=int, help="version of ONNX's operators")
    given = parser.parse_args(arguments)
    model = _load(given.model)
    settings: dict[str, Any] = {"include_preprocessing": given.include_preprocessing, "opset": given.opset}
    if given.data is not None:
        settings["calibration_dataset"] = import_module("hf_scan.workflows.data_arguments").some_images(
            given.data, _processor(given.model)
        )
    model.export_onnx(given.output, **settings)
    files = sorted(str(path.relative_to(given.output)) for path in Path(given.output).rglob("*") if path.is_file())
    print(f"Written to {given.output}: {', '.join(files)}")
    return {"output": given.output, "files": files}


def _predict(arguments: list[str]) -> Any:
    parser = _parser("predict", "runs/photos photo.jpg another.jpg")
    parser.add_argument("model", help="a trained network or an export to ONNX: a folder, or a repository on the Hub")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--max-exit", type=int, help="deepest exit that may answer (default: any)")
    given = parser.parse_args(arguments)
    model, processor = _load(given.model), _processor(given.model)
    read_image = import_module("hf_scan.model.image_files").read_image
    adaptive = model.exit_config.thresholds is not None
    answers = []
    for path in given.images:
        pixel_values = processor([read_image(path)], return_tensors="pt")["pixel_values"]
        rule = {} if adaptive else {"thresholds": [None] * (model.num_exits - 1), "fallback": "deepest"}
        answer = model.predict_adaptive(pixel_values, max_exit=given.max_exit, **rule)
        label = model.config.id2label[int(answer.logits[0].argmax())]
        confidence, exit_index = float(answer.confidence[0]), int(answer.exit_index[0])
        answers.append({"image": path, "label": label, "confidence": confidence, "exit": exit_index})
        print(f"{path}: {label}, {confidence:.3f}, exit {exit_index}")
    return answers


def _serve(arguments: list[str]) -> Any:
    parser = _parser("serve", "--model runs/photos --port 8000")
    parser.add_argument(
        "--model", required=True, help="a trained network or an export to ONNX: a folder, or the Hub's"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, loopback)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default: 8000)")
    parser.add_argument("--threads", type=int, help="threads to compute with (default: the runtime's)")
    parser.add_argument("--batch-size", type=int, default=16, help="images with which a stage runs (default: 16)")
    parser.add_argument(
        "--max-wait-ms", type=float, default=2.0, help="how long an image waits for others (default: 2)"
    )
    parser.add_argument("--max-queue", type=int, default=256, help="images in work; more get 503 (default: 256)")
    parser.add_argument("--max-images", type=int, default=64, help="images of a request (default: 64)")
    parser.add_argument("--max-megabytes", type=float, default=32, help="size of a request (default: 32)")
    parser.add_argument("--max-megapixels", type=float, default=50, help="size of an image (default: 50)")
    parser.add_argument("--timeout-ms", type=float, default=30_000, help="time for an answer (default: 30000)")
    given = parser.parse_args(arguments)
    import_module("hf_scan.extras").require_extra("serve", "A server")
    server = import_module("hf_scan.serving.server")
    names = ("batch_size", "max_wait_ms", "max_queue", "max_images", "timeout_ms")
    settings = server.ServerSettings(
        **{name: getattr(given, name) for name in names},
        max_bytes=round(given.max_megabytes * 2**20),
        max_pixels=round(given.max_megapixels * 1e6),
    )
    loaded = import_module("hf_scan.serving.loading").load_model(given.model, given.threads)
    print(f"Serving {given.model} at http://{given.host}:{given.port}, explained at /docs", flush=True)
    server.serve(loaded, given.host, given.port, settings)
    return {"model": given.model}


def _demo(arguments: list[str]) -> Any:
    parser = _parser("demo", "--model runs/quickstart")
    parser.add_argument("--model", required=True, help="a trained network: a folder, or a repository on the Hub")
    parser.add_argument(
        "--data", help="a folder of images, a folder for each class, to show and to find thresholds on"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at (default: 7860)")
    given = parser.parse_args(arguments)
    import_module("hf_scan.extras").require_extra("demo", "The demo")
    page = import_module("hf_scan.demo.page")
    blocks = page.build_page(given.model, given.data)
    page.launch_page(blocks, server_name=given.host, server_port=given.port)
    return {"model": given.model}


def _load(name: str, threads: int | None = None) -> Any:
    """Return a network, or the engine of one that was exported, with so many threads."""
    if Path(name, "onnx").is_dir():
        runtime = import_module("hf_scan.runtime")
        options = None if threads is None else runtime.threaded_options(threads)
        return runtime.ORTScanForImageClassification.from_pretrained(name, session_options=options)
    return import_module("hf_scan").ScanForImageClassification.from_pretrained(name).eval()


def _processor(name: str) -> Any:
    return import_module("transformers").AutoImageProcessor.from_pretrained(name)


COMMANDS: dict[str, tuple[str, Callable[[list[str]], Any]]] = {
    "equip": ("Make a trained classifier faster, from its weights and a folder of images.", _equip),
    "advise": ("Tell what early exits cost on a network, and whether they can pay.", _advise),
    "train": ("Train a network with early exits on a dataset, find its thresholds and test it.", _train),
    "calibrate": ("Find the thresholds of a trained network for a target, and test them.", _calibrate),
    "measure": ("Measure what each stage and each exit costs on this machine.", _measure),
    "export": ("Export a network to ONNX, for runtimes without PyTorch.", _export),
    "predict": ("Classify images, each by the first exit that is confident enough.", _predict),
    "serve": ("Classify images over HTTP, each caller answered as soon as the image exits.", _serve),
    "demo": ("Show in the browser where images leave a network, and what that saves.", _demo),
}


if __name__ == "__main__":
    sys.exit(main())
