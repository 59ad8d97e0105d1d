"""Checkpoints that mean harm: refused before anything of theirs is run or read, or memory is taken for it."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForImageClassification

from hf_scan import ExitConfig, ScanForImageClassification

from ..conftest import random_scan_model


@pytest.fixture
def checkpoint(tmp_path):
    """In shards, with thresholds."""
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[0.5, 0.5])
    model.save_pretrained(tmp_path / "checkpoint", max_shard_size="200KB")
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 1
    return tmp_path / "checkpoint"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Harm:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("name", ["shards", "model.safetensors", "pytorch_model.bin"])
def test_pickles_under_any_name(checkpoint, tmp_path, name):
    harm = pickle.dumps(Harm(tmp_path / "mark"))
    shards = sorted(checkpoint.glob("*.safetensors"))
    if name == "shards":
        shards[0].write_bytes(harm)
    else:
        for file in (*shards, checkpoint / "model.safetensors.index.json"):
            file.unlink()
        (checkpoint / name).write_bytes(harm)
    with pytest.raises(OSError, match=r"cannot be read|no model that can be loaded"):
        ScanForImageClassification.from_pretrained(checkpoint)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("variant", [None, "v"])
def test_shards_elsewhere(checkpoint, tmp_path, absolute, variant):
    index = checkpoint / "model.safetensors.index.json"
    if variant is not None:
        index = index.rename(checkpoint / f"model.safetensors.index.{variant}.json")
    weight_map = json.loads(index.read_text())["weight_map"]
    first = min(weight_map.values())
    (checkpoint / first).rename(tmp_path / first)
    there = str(tmp_path / first) if absolute else f"../{first}"
    edit(index, weight_map={key: there if file == first else file for key, file in weight_map.items()})
    with pytest.raises(ValueError, match="which is not a file beside it"):
        ScanForImageClassification.from_pretrained(checkpoint, variant=variant)


@pytest.mark.parametrize("name", ["x.safetensors.index.json", "adapter_model.bin", "../model.safetensors"])
def test_a_configuration_that_names_its_weights(checkpoint, name):
    edit(checkpoint / "config.json", transformers_weights=name)
    with pytest.raises(ValueError, match=r"names \['transformers_weights'\]"):
        ScanForImageClassification.from_pretrained(checkpoint)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', "{", "[" * 100_000])
def test_an_index_that_is_none(checkpoint, content):
    (checkpoint / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="is not an index of weights"):
        ScanForImageClassification.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    "thresholds", ["[NaN, 0.5]", "[Infinity, 0.5]", "[-1e308, 0.5]", "[1e308, 0.5]", "[[0.5], 0.5]", "{}", '"0.5"']
)
def test_thresholds_out_of_range(checkpoint, thresholds):
    (checkpoint / "exit_config.json").write_text(f'{{"thresholds": {thresholds}}}')
    with pytest.raises(ValueError, match=r"exit_config.json of .* is not a valid exit configuration"):
        ScanForImageClassification.from_pretrained(checkpoint)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"thresholds": [0.5, 0.5]', "\x00", "[0.5, 0.5]"])
def test_an_exit_configuration_that_is_none(checkpoint, content):
    (checkpoint / "exit_config.json").write_text(content)
    with pytest.raises(ValueError, match="is not a valid exit configuration"):
        ScanForImageClassification.from_pretrained(checkpoint)


TOO_LARGE = [
    {"num_labels": 10**9, "id2label": None, "label2id": None},
    {"head_width": 10**9},
    {"head_width": 8192},  # of heads that the weights leave out
    {"num_channels": 10**9},
    {"image_size": 10**9},
    {"backbone_kwargs": {"channels": [10**9, 10**9, 10**9]}},
    {"backbone_kwargs": {"nested": {"depths": [[10**12]]}}},
    {"backbone_kwargs": {"layers": [60_000, 60_000, 60_000]}},
    {"backbone_kwargs": {"layers": [1000, 1000, 1000]}},
]


def test_sizes_that_would_take_all_memory(checkpoint, tmp_path):
    """Where the system lets it, in a process with little memory, where making anything of that size fails."""
    folders = []
    for index, changes in enumerate(TOO_LARGE):
        folders.append(shutil.copytree(checkpoint, tmp_path / str(index)))
        edit(folders[-1] / "config.json", **changes)
    code = """
import sys
from hf_scan import ScanForImageClassification
if sys.platform == "linux":
    import resource
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for folder in sys.argv[1:]:
    try:
        ScanForImageClassification.from_pretrained(folder)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(TOO_LARGE)
    said = ("and at most", "a number beyond", "more than 2048 in all")
    assert all(any(words in line for words in said) for line in lines)


def test_code_is_not_run_unasked(checkpoint, tmp_path):
    """Neither where `hf_scan` is installed, with its own classes, nor where it is not."""
    (checkpoint / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'mark')!r})\nclass Evil: pass\n")
    names = {"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.Evil"}
    edit(checkpoint / "config.json", auto_map=names)
    model = AutoModelForImageClassification.from_pretrained(checkpoint, trust_remote_code=True)
    assert type(model) is ScanForImageClassification
    code = f"""
import sys
sys.modules["hf_scan"] = None
from transformers import AutoModelForImageClassification
AutoModelForImageClassification.from_pretrained({str(checkpoint)!r}, trust_remote_code=False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "trust_remote_code" in done.stderr
    assert done.returncode != 0
    assert not (tmp_path / "mark").exists()


def test_an_adapter_that_names_another_model(checkpoint, tmp_path, monkeypatch):
    """With `peft`, Transformers would load that in place of this."""
    monkeypatch.setattr("hf_scan.model.loading_checks.is_peft_available", lambda: True)
    ScanForImageClassification.from_pretrained(checkpoint)
    adapter = {"base_model_name_or_path": str(tmp_path / "elsewhere"), "peft_type": "LORA"}
    (checkpoint / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ValueError, match=r"holds 'adapter_config.json', by which Transformers would load"):
        ScanForImageClassification.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    "name",
    ["_attn_implementation", "attn_implementation", "_attn_implementation_internal", "experts_implementation"],
)
@pytest.mark.parametrize("value", ["bob/evil-kernel", {"": "bob/evil-kernel"}, ["bob/evil-kernel"], 3, True])
def test_a_kernel_from_the_hub(checkpoint, name, value):
    edit(checkpoint / "config.json", **{name: value})
    with pytest.raises(ValueError, match=rf"config.json of .*{name}` names the kernel .*Remove it"):
        ScanForImageClassification.from_pretrained(checkpoint)


@pytest.mark.parametrize("search", ['{"accuracy": NaN}', '{"accuracy": 1e400}'])
def test_what_could_not_be_saved_again(checkpoint, search):
    (checkpoint / "exit_config.json").write_text(f'{{"thresholds": [0.5, 0.5], "search": {search}}}')
    with pytest.raises(ValueError, match=r"exit_config.json of .* is not a valid exit configuration: `search` holds"):
        ScanForImageClassification.from_pretrained(checkpoint)


def test_a_guarantee_of_nothing(checkpoint):
    """One that does not say what rule it is of would be shown for any."""
    edit(checkpoint / "exit_config.json", guarantee={"loss": "gap", "max_drop": 0.1, "delta": 0.05, "n": 10**6})
    with pytest.raises(ValueError, match="The guarantee is of None"):
        ScanForImageClassification.from_pretrained(checkpoint)


VIT = "vit_tiny_patch16_224"
# What a few weights cannot be of: each would take gigabytes, or minutes.
FAR_LARGER = [
    {"backbone": "vit_giant_patch14_224"},
    {"backbone": "eva_giant_patch14_560"},
    {"backbone": "regnety_2560"},
    {"backbone": VIT, "backbone_kwargs": {"mlp_ratio": 65536}},
    {"backbone": VIT, "backbone_kwargs": {"depth": 2000}},
    {"backbone": VIT, "backbone_kwargs": {"img_size": [4096, 4096], "patch_size": 1}},
    {"backbone": "densenet121", "backbone_kwargs": {"block_config": [500, 500, 500, 500]}},
    {"backbone": "resnet18", "backbone_kwargs": {"layers": [500, 500, 500, 500]}},
    {"backbone": VIT, "image_size": 16384},
    {"backbone": "swin_tiny_patch4_window7_224", "image_size": 16384},
    {"backbone": "swinv2_tiny_window8_256", "image_size": 16384},
]


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("changes", FAR_LARGER, ids=str)
def test_a_network_far_larger_than_its_weights(checkpoint, changes, ignored):
    """Refused before memory is taken for it, and before more of it is built than the weights could be of."""
    edit(checkpoint / "config.json", **{"exit_points": None, "backbone_kwargs": {}, "image_size": None, **changes})
    numbers = modules = 0

    def add(module, name, parameter):
        nonlocal numbers, modules
        modules += 1
        numbers += 0 if parameter.is_meta else parameter.numel()

    handle = register_module_parameter_registration_hook(add)
    try:
        with pytest.raises((ValueError, RuntimeError), match=r"config\.json"):
            ScanForImageClassification.from_pretrained(checkpoint, ignore_mismatched_sizes=ignored)
    finally:
        handle.remove()
    assert numbers == 0
    assert modules < 2000


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"backbone": VIT, "backbone_kwargs": {"patch_size": 0}}, "timm cannot make .*ZeroDivisionError"),
        ({"backbone": VIT, "backbone_kwargs": {"act_layer": "nope"}}, "timm cannot make .*KeyError"),
        ({"backbone": VIT, "backbone_kwargs": {"num_heads": 7}}, "timm cannot make .*divisible by num_heads"),
        ({"backbone": "resnet18", "backbone_kwargs": {"norm_layer": {}}}, r"timm cannot make .*AssertionError\(\)"),
        ({"backbone": "x" * 10**6}, "which timm .* does not know"),
        ({"dtype": "int8"}, "`dtype` is 'int8'"),
        ({"dtype": "load"}, "`dtype` is 'load'"),
        ({"dtype": 3}, "`dtype` is 3"),
        ({"torch_dtype": {"": "float32"}}, "`torch_dtype` is"),
        ({"id2label": ["cat"]}, "`id2label` is not a dictionary"),
        ({"id2label": {"a": "b"}}, "`id2label` is not a dictionary"),
        ({"id2label": {}}, "`id2label` is empty; expected the name of each label"),
        ({"num_labels": "5"}, "`num_labels` is '5'; expected a whole number"),
        ({"backbone_kwargs": {"block_args": False}}, "timm cannot make .*unexpected keyword argument"),
        ({"backbone_kwargs": {"act_layer": "x" * 10**5}}, "timm cannot make .*Correct the name or `backbone_kwargs`"),
        ({"model_type": ["x" * 10**5]}, "This is the configuration of a .* of model_type 'scan'"),
        ({"quantization_config": []}, r"`quantization_config` is \[\]; expected the settings"),
        ({"id2label": {"0": {}, "1": "b"}}, "`id2label` holds a label that is no text"),
        ({"label2id": {"a": []}}, "`label2id` is not a dictionary"),
        ({"preprocessing": {"mean": "x"}}, "'mean' as 'x'; expected a list"),
        ({"preprocessing": {"mean": [1e400]}}, "'mean' as .*; expected a list"),
        ({"preprocessing": {"std": [0, 0, 0]}}, "'std' as .*; expected a list"),
        ({"preprocessing": {"crop_pct": 0}}, "'crop_pct' as 0; expected a number"),
        ({"preprocessing": {"interpolation": "nope"}}, "'interpolation' as 'nope'; expected one of"),
        ({"preprocessing": {"crop_mode": []}}, r"'crop_mode' as \[\]; expected one of"),
        ({"preprocessing": [3]}, "'preprocessing'"),
        ({"exit_points": [[]]}, "'exit_points'"),
        ({"exit_points": ["layer1"] * 10**5}, "`exit_points` has 100000 entries"),
        ({"quantization_config": 3}, "describes no network"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_values_that_make_no_network(checkpoint, changes, sentence):
    edit(checkpoint / "config.json", **({"exit_points": None} if "backbone" in changes else {}), **changes)
    with pytest.raises(ValueError, match=rf"^config\.json of .*{sentence}") as raised:
        ScanForImageClassification.from_pretrained(checkpoint)
    assert len(str(raised.value)) < 2000


@pytest.mark.parametrize("name", ["config.json", "exit_config.json", "model.safetensors.index.json", "a shard"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling link"])
def test_a_file_that_is_no_regular_one(checkpoint, name, kind):
    path = min(checkpoint.glob("*.safetensors")) if name == "a shard" else checkpoint / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)  # a reader would wait for ever
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(checkpoint / "nowhere")
    with pytest.raises(OSError, match=f"{path.name} is no regular file"):
        ScanForImageClassification.from_pretrained(checkpoint)


def test_a_device(checkpoint):
    (checkpoint / "exit_config.json").unlink()
    (checkpoint / "exit_config.json").symlink_to("/dev/zero")
    with pytest.raises(OSError, match=r"exit_config\.json is no regular file"):
        ScanForImageClassification.from_pretrained(checkpoint)


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped header", "text"])
def test_a_damaged_file_is_named(checkpoint, damage):
    shard = max(checkpoint.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(
        {
            "truncated": content[:-100],
            "empty": b"",
            "flipped header": bytes([content[0] ^ 255]) + content[1:],
            "text": b"version https://git-lfs.github.com/spec/v1",
        }[damage]
    )
    with pytest.raises(OSError, match=rf"{shard.name} cannot be read .*Save or download it again"):
        ScanForImageClassification.from_pretrained(checkpoint)
