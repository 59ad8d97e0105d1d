# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Save an exported network with its exit configuration, to a folder or the Hub."""

import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..model.named_errors import named_push_errors
from .loading import EXIT_CONFIG_NAME
from .manifest import ONNX_FOLDER, Manifest
from .numpy_rule import RULE, ExitSettings, plan_steps
from .staged_export import COMPLETE, WRITING, staged_export


def save_export(folder: Path, manifest: Manifest, exit_config: Any, target: Path) -> None:
    """
    Write an export with an exit configuration to a folder, which may be its own. Earlier files of the same names are
    replaced once everything is written, all together.

    Args:
        folder (`Path`): The export.
        manifest ([`Manifest`]): The manifest of the export.
        exit_config: Written to `exit_config.json`, and to `adaptive.onnx` if that holds another rule.
        target (`Path`): The folder to write to.

    Raises:
        `ValueError`: if `target` is a file.
        `OSError`: if the folder cannot be written, as when the disk is full.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; expected a folder to save to. Name another one.")
    # Others stay, such as an export in 8 bits or a card. Where none is written, the exit configuration is the default.
    with staged_export(target, removed=lambda name: name == EXIT_CONFIG_NAME) as new:
        shutil.copytree(folder, new, ignore=shutil.ignore_patterns(f"{WRITING}*", f"{COMPLETE}*"))
        (new / EXIT_CONFIG_NAME).unlink(missing_ok=True)
        if exit_config != type(exit_config)():  # also where it only says what the weights were trained on
            exit_config.save_pretrained(new)
        settings = ExitSettings.of(exit_config)
        if settings.thresholds is not None and not manifest.holds(settings, plan_steps(settings, manifest.num_exits)):
            _nest_again(settings, manifest, new / ONNX_FOLDER)


def _nest_again(settings: ExitSettings, manifest: Manifest, folder: Path) -> None:
    """Write `adaptive.onnx` for another rule, or remove it where the package onnx is not installed."""
    manifest = replace(manifest, adaptive=None)
    (folder / "adaptive.onnx").unlink(missing_ok=True)
    if find_spec("onnx") is not None:
        import onnx

        from .graphs import nest

        plan = plan_steps(settings, manifest.num_exits)
        rule = {name: getattr(settings, name) for name in RULE if name != "thresholds"}
        manifest.adaptive = {**rule, "heads": [step.runs for step in plan]}
        names = [f"stage_{i}.onnx" if step.runs else f"stage_{i}_without_head.onnx" for i, step in enumerate(plan)]
        stages = [onnx.load(folder / name, load_external_data=False) for name in names]
        states = [[value["name"] for value in values] for values in manifest.states]
        onnx.save(nest(stages, states, manifest.adaptive), folder / "adaptive.onnx")
    manifest.save(folder)


def upload_export(folder: Path, repo_id: str, **kwargs: Any) -> Any:
    """
    Upload an export in one commit, which also removes the graphs of an earlier export.

    Args:
        folder (`Path`): The export.
        repo_id (`str`): The repository. It is created when there is none.
        kwargs: `private`, `token`, `revision` (a branch, created when there is none), `subfolder`, and what
            [`~huggingface_hub.HfApi.upload_folder`] takes, such as `commit_message` or `create_pr`.

    Raises:
        `OSError`: if the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api, private = HfApi(token=kwargs.pop("token", None)), kwargs.pop("private", None)
    with named_push_errors(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        branch = kwargs.get("revision")
        if branch is not None and not branch.startswith("refs/pr"):
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=kwargs.pop("subfolder", None),
            delete_patterns=f"{ONNX_FOLDER}/*",
            **{"commit_message": "Upload ONNX model", **kwargs},
        )


__all__ = ["save_export", "upload_export"]
