"""Networks with early exits on the Hub: what is pushed, what is loaded, and what happens when things go wrong."""

import json
import re
import threading
import time

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load
from transformers.utils import hub as transformers_hub

from hf_scan import ExitConfig, ScanForImageClassification

from ..conftest import random_scan_model


FILES = {
    ".gitattributes",
    "README.md",
    "config.json",
    "exit_config.json",
    "model.safetensors",
    "preprocessor_config.json",
}
# Whether a load first asks the Hub for a commit. With older versions of Transformers, it asks for each file.
RESOLVES = hasattr(transformers_hub, "resolve_revision")
FIRST = ExitConfig(thresholds=[0.5, None, 0.8], search={"method": "by hand"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network with thresholds, in a folder, and what it answers to some images."""
    folder = tmp_path_factory.mktemp("net")
    model = random_scan_model(image_size=32)
    model.exit_config = FIRST
    model.save_pretrained(folder)
    model = ScanForImageClassification.from_pretrained(folder)
    return folder, model


PUSH = """
import sys
from hf_scan import ScanForImageClassification
model = ScanForImageClassification.from_pretrained(sys.argv[1])
"""

# Loads by name, and writes what is answered.
LOAD = """
import sys, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
import hf_scan
torch.set_num_threads(1)
def load(name, target, **options):
    model = AutoModelForImageClassification.from_pretrained(name, **options)
    processor = AutoImageProcessor.from_pretrained(name, **options)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(images).logits
    exits = model.predict_adaptive(images).exit_index
    torch.save((logits, exits, model.exit_config.thresholds, processor.crop_pct, type(model).__module__), target)
"""


READ = 'load("alice/net", sys.argv[1])'


def answers(model) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(images).logits, model.predict_adaptive(images).exit_index


def check(target, model) -> None:
    """The same as the network here: the weights to the bit, what they answer to what another process may round."""
    logits, exits, thresholds, crop, module = torch.load(target)
    expected = answers(model)
    torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(exits, expected[1])
    assert thresholds == FIRST.thresholds
    assert crop == model.config.preprocessing["crop_pct"]
    assert module == "hf_scan.model.modeling_scan"


def test_pushed_by_one_and_loaded_by_another(hub, checkpoint, tmp_path):
    folder, model = checkpoint
    hub.run(PUSH + 'model.push_to_hub("alice/net", commit_message="First")', folder)
    files = hub.files("alice/net")
    assert set(files) == FILES
    for name in ("model.safetensors", "exit_config.json"):
        assert files[name] == (folder / name).read_bytes()
    assert [commit.title for commit in hub.commits("alice/net")] == ["First", "initial commit"]  # nothing half made
    assert {"scan", "early-exit"} <= set(ModelCard(files["README.md"].decode()).data.tags)

    # From the cache, without a network, it is whole; without a cache, there is one sentence.
    cache = hub.new_folder("home")
    code = LOAD + 'load("alice/net", sys.argv[1])'
    hub.run(code, tmp_path / "answers", user="bob", cache=cache)
    check(tmp_path / "answers", model)
    hub.run(code, tmp_path / "again", user="bob", cache=cache, HF_HUB_OFFLINE="1")
    check(tmp_path / "again", model)
    error = hub.run(code, tmp_path / "none", user="bob", HF_HUB_OFFLINE="1", expect_error=True)
    assert error.splitlines()[-1].startswith(("OSError", "Check"))


def test_operating_points_and_revisions(hub, checkpoint, tmp_path):
    """Several of them beside one model; weights and thresholds of an older revision belong together."""
    folder, model = checkpoint
    code = """
from hf_scan import ExitConfig
model.push_to_hub("alice/net", revision="work", create_pr=False)
print(ExitConfig(thresholds=[0.1, 0.1]).push_to_hub("alice/net", "exit_config_fast.json", revision="work").oid)
print(ExitConfig(thresholds=[0.9, 0.9, 0.9]).push_to_hub("alice/net", revision="work").oid)
fast = ExitConfig.from_pretrained("alice/net", "exit_config_fast.json", revision="work")
assert fast.thresholds == [0.1, 0.1], fast
assert ExitConfig.from_pretrained("alice/net", revision="work").thresholds == [0.9, 0.9, 0.9]
loaded = ScanForImageClassification.from_pretrained("alice/net", revision="work", exit_config=fast)
assert loaded.exit_config == fast
ScanForImageClassification.from_pretrained("alice/net", revision="work").push_to_hub("alice/net", create_pr=True)
"""
    shas = hub.run(PUSH + code, folder).stdout.split()
    hub.run(LOAD + 'load("alice/net", sys.argv[1], revision=sys.argv[2])', tmp_path / "older", shas[-2])
    check(tmp_path / "older", model)
    assert set(hub.files("alice/net")) == {".gitattributes"}
    assert "model.safetensors" in hub.files("alice/net", "refs/pr/1")


@pytest.mark.parametrize("loader", ["AutoModelForImageClassification", "hf_scan.ScanForImageClassification"])
def test_never_weights_of_one_commit_and_thresholds_of_another(hub, checkpoint, tmp_path, loader):
    """Somebody pushes while somebody else loads."""
    folder, model = checkpoint
    hub.push("alice/net", {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    hub.misbehave("GET", "model.safetensors", action="delay", seconds=4)

    def push_meanwhile() -> None:
        while not hub.seen("GET", "model.safetensors"):
            time.sleep(0.05)
        other = json.dumps({"thresholds": [0.0, 0.0, 0.0]}).encode()
        hub.push("alice/net", {"exit_config.json": other})

    thread = threading.Thread(target=push_meanwhile)
    thread.start()
    hub.run(LOAD.replace("AutoModelForImageClassification.f", f"{loader}.f") + READ, tmp_path / "answers")
    thread.join()
    assert len(hub.commits("alice/net")) == 3
    check(tmp_path / "answers", model)


@pytest.mark.skipif(not RESOLVES, reason="this version of Transformers does not ask which commit is the newest")
def test_an_old_cache_and_a_hub_that_falters(hub, checkpoint, tmp_path):
    """What is in the cache is loaded then: all of it, and not the thresholds of what has come since."""
    folder, model = checkpoint
    hub.push("alice/net", {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    cache = hub.new_folder("home")
    code = LOAD.replace("AutoModelForImageClassification.f", "hf_scan.ScanForImageClassification.f") + READ
    hub.run(code, tmp_path / "before", cache=cache)
    hub.push("alice/net", {"exit_config.json": json.dumps({"thresholds": [0.0, 0.0, 0.0]}).encode()})
    hub.misbehave("GET", "/api/models", status=500)
    hub.run(code, tmp_path / "after", cache=cache)
    check(tmp_path / "after", model)


@pytest.mark.parametrize("status", [403, pytest.param(503, marks=pytest.mark.slow)])  # it is asked for again
def test_thresholds_that_do_not_arrive_are_not_taken_for_missing(hub, checkpoint, status):
    folder, _ = checkpoint
    hub.push("alice/net", {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    hub.misbehave("HEAD", "exit_config.json", status=status, times=None)
    error = hub.run(
        'import hf_scan; hf_scan.ScanForImageClassification.from_pretrained("alice/net")', expect_error=True
    )
    assert "exit_config.json of alice/net could not be loaded" in error.splitlines()[-1]


def test_names_of_operating_points(hub, checkpoint):
    """By name beside the model; a name that is wrong is no model without thresholds."""
    folder, _ = checkpoint
    code = """
from hf_scan import ExitConfig
model.push_to_hub("alice/net")
ExitConfig(thresholds=[0.1, 0.1]).push_to_hub("alice/net", "exit_config_fast.json")
load = ScanForImageClassification.from_pretrained
assert load("alice/net", exit_config="exit_config_fast.json").exit_config.thresholds == [0.1, 0.1]
for attempt in (
    lambda: load("alice/net", exit_config="exit_config_fsat.json"),
    lambda: ExitConfig.from_pretrained("alice/net", "exit_config_fsat.json"),
    lambda: ExitConfig.from_pretrained("alice/nothing", local_files_only=True),
    lambda: ExitConfig.from_pretrained("alice/net", "../exit_config.json"),
    lambda: ExitConfig.from_pretrained("alice/nothing"),
):
    try:
        attempt()
        print("none")
    except (OSError, ValueError) as error:
        print(type(error).__name__, error)
"""
    said = hub.run(PUSH + code, folder).stdout.splitlines()
    wrong = "OSError alice/net has no 'exit_config_fsat.json'. Correct the name"
    assert said[0].startswith(wrong)
    assert said[1].startswith(wrong)
    assert said[2].startswith("OSError exit_config.json of alice/nothing could not be loaded")
    assert said[3].startswith("ValueError '../exit_config.json' is not the name of a file")
    assert said[4].startswith("OSError exit_config.json of alice/nothing could not be loaded (RepositoryNotFoundError")


@pytest.mark.slow
def test_pushed_into_a_subfolder(hub, checkpoint, tmp_path):
    folder, model = checkpoint
    code = """
from hf_scan import ExitConfig
old = ScanForImageClassification(model.config)
old.push_to_hub("alice/net", max_shard_size="200KB")
old.push_to_hub("alice/net", subfolder="small", max_shard_size="200KB")
model.push_to_hub("alice/net", subfolder="small")
ExitConfig(thresholds=[0.1, 0.1]).push_to_hub("alice/net", "fast.json", subfolder="small")
fast = ScanForImageClassification.from_pretrained("alice/net", subfolder="small", exit_config="fast.json")
assert fast.exit_config.thresholds == [0.1, 0.1]
"""
    hub.run(PUSH + code, folder)
    files = hub.files("alice/net")
    assert {"small/model.safetensors", "small/exit_config.json", "small/fast.json"} <= set(files)
    assert not any(name.startswith("small/model-") for name in files)
    assert any(name.startswith("model-") for name in files)  # those of the other model stay
    hub.run(LOAD + 'load("alice/net", sys.argv[1], subfolder="small")', tmp_path / "answers")
    check(tmp_path / "answers", model)


def test_a_push_leaves_nothing_of_the_model_before(hub, checkpoint, tmp_path):
    """Weights in other shards, or thresholds that are gone: what is loaded is what was pushed last."""
    folder, model = checkpoint
    code = """
from hf_scan import ExitConfig
import torch
old = ScanForImageClassification(model.config)
old.exit_config = ExitConfig(thresholds=[0.1, 0.1])
old.push_to_hub("alice/one")
old.push_to_hub("alice/none", max_shard_size="200KB")
model.push_to_hub("alice/one", max_shard_size="200KB")
bare = ScanForImageClassification(model.config)
bare.push_to_hub("alice/none")
loaded = ScanForImageClassification.from_pretrained("alice/none")
assert loaded.exit_config.thresholds is None and loaded.fingerprint() == bare.fingerprint()
"""
    hub.push("alice/one", {"small/model.safetensors": b"another's"})
    hub.run(PUSH + code, folder)
    hub.run(LOAD + READ.replace("net", "one"), tmp_path / "answers")
    check(tmp_path / "answers", model)
    assert "model.safetensors" not in hub.files("alice/one")
    assert hub.files("alice/one")["small/model.safetensors"] == b"another's"
    assert {name for name in hub.files("alice/none") if "safetensors" in name} == {"model.safetensors"}


def test_the_card_of_a_push(hub, checkpoint):
    """One where there is none, whose five lines run."""
    folder, _ = checkpoint
    hub.run(PUSH + 'model.push_to_hub("alice/net", tags=["mine"])', folder)
    card = ModelCard(hub.files("alice/net")["README.md"].decode())
    assert (card.data.pipeline_tag, card.data.library_name) == ("image-classification", "transformers")
    assert {"scan", "mine"} <= set(card.data.tags)
    assert "More Information Needed" not in card.text
    assert "self-distillation" not in card.text  # which nobody has said
    use = card.text.split("```python")[1].split("```")[0]
    hub.run("import torch\nimage = torch.rand(3, 32, 32)\n" + use)


@pytest.mark.slow
def test_a_push_leaves_a_card_of_others(hub, checkpoint):
    """Also where it cannot be read."""
    folder, _ = checkpoint
    theirs = b"---\ntags:\n- scan\n- early-exit\n- timm\n- hf_scan\n---\n# By hand\n"
    for fault in (None, {"method": "HEAD", "path": "README.md", "status": 503, "times": None}):
        hub.push("alice/net", {"README.md": theirs})
        if fault is not None:
            hub.misbehave(**fault)
        hub.run(PUSH + 'model.push_to_hub("alice/net")', folder)
        assert hub.files("alice/net")["README.md"] == theirs


@pytest.mark.slow
def test_the_card_of_a_network_without_thresholds_runs_too(hub, checkpoint):
    folder, _ = checkpoint
    hub.run(
        PUSH + "from hf_scan import ExitConfig\nmodel.exit_config = ExitConfig()\nmodel.push_to_hub('alice/net')",
        folder,
    )
    card = ModelCard(hub.files("alice/net")["README.md"].decode())
    assert "no thresholds" in card.text
    use = card.text.split("```python")[1].split("```")[0]
    assert "predict_adaptive" not in use
    hub.run("import torch\nimage = torch.rand(3, 32, 32)\n" + use)


def test_private_sharded_and_in_a_subfolder(hub, checkpoint, tmp_path):
    folder, model = checkpoint
    hub.run(PUSH + 'model.push_to_hub("alice/secret", private=True, max_shard_size="300KB")', folder)
    files = hub.files("alice/secret")
    assert sum(name.endswith(".safetensors") for name in files) > 1
    hub.push("alice/many", {f"small/{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()})
    code = """
load("alice/secret", sys.argv[1])
load("alice/many", sys.argv[2], subfolder="small")
"""
    hub.run(LOAD + code, tmp_path / "secret", tmp_path / "many")
    strangers = """
try:
    load("alice/secret", sys.argv[1])
except OSError as error:
    print(error)
if len(sys.argv) > 2:
    load("alice/secret", sys.argv[1], token=sys.argv[2])
"""
    for user, token in (("bob", []), (None, [hub.tokens["alice"]])):
        done = hub.run(LOAD + strangers, tmp_path / f"token-{user}", *token, user=user)
        assert "alice/secret is not a local folder and is not a valid model" in done.stdout
    assert not (tmp_path / "token-bob").exists()
    for name in ("secret", "many", "token-None"):
        check(tmp_path / name, model)


def test_pipeline_by_name(hub, checkpoint):
    """The task too is read from the card."""
    folder, _ = checkpoint
    code = """
from PIL import Image
from transformers import pipeline
model.push_to_hub("alice/net")
classify = pipeline(model="alice/net")
print(type(classify).__name__, classify(Image.new("RGB", (32, 32)), top_k=1, return_exit=True))
"""
    done = hub.run(PUSH + code, folder)
    assert done.stdout.startswith("ScanImageClassificationPipeline [{'label': 'LABEL_")
    assert ModelCard(hub.files("alice/net")["README.md"].decode()).data.pipeline_tag == "image-classification"


def test_weights_of_timm(hub, tmp_path):
    """As others have put them on the Hub, with their own code for the network or none."""
    code = """
import timm, torch
from timm.models import push_to_hf_hub
from hf_scan import ScanForImageClassification
torch.manual_seed(0)
net = timm.create_model("resnet10t", num_classes=7)
push_to_hf_hub(net, "alice/pets", model_config={"label_names": list("abcdefg")})
model = ScanForImageClassification.from_timm("hf-hub:alice/pets", pretrained=True).eval()
images = torch.randn(2, 3, 96, 96)
assert torch.equal(model(images).logits, net.eval()(images))
assert model.config.backbone.startswith("resnet10t"), model.config.backbone
assert model.config.id2label[3] == "d", model.config.id2label
model.push_to_hub("alice/pets-scan")
"""
    hub.run(code)
    config = json.loads(hub.files("alice/pets-scan")["config.json"])
    assert config["backbone"].startswith("resnet10t")


def test_weights_of_timm_for_small_images(hub):
    """As `edadaltocg/resnet18_cifar100` is: timm's name, another stem, and a pickle of weights."""
    code = """
import json, timm, torch
from huggingface_hub import HfApi
from torch import nn
from hf_scan import ScanForImageClassification
torch.manual_seed(0)
net = timm.create_model("resnet18", num_classes=100)
net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
torch.save(net.state_dict(), "pytorch_model.bin")
cfg = {"input_size": [3, 32, 32], "first_conv": "conv1", "classifier": "fc", "mean": [0.5] * 3, "std": [0.2] * 3}
cfg = {"architecture": "resnet18", "num_classes": 100, "pretrained_cfg": {**cfg, "num_classes": 100}}
with open("config.json", "w") as file:
    json.dump(cfg, file)
HfApi().create_repo("alice/resnet18_cifar100")
for name in ("config.json", "pytorch_model.bin"):
    HfApi().upload_file(path_or_fileobj=name, path_in_repo=name, repo_id="alice/resnet18_cifar100")
model = ScanForImageClassification.from_timm("hf-hub:alice/resnet18_cifar100", pretrained=True).eval()
images = torch.randn(2, 3, 32, 32)
assert torch.equal(model(images).logits, net.eval()(images))
assert (model.config.backbone, model.config.num_labels) == ("cifar_resnet18", 100)
assert model.config.preprocessing["mean"] == [0.5] * 3
other = ScanForImageClassification.from_timm("hf-hub:alice/resnet18_cifar100", pretrained=True, num_labels=7)
assert torch.equal(other.backbone.layer4[1].conv2.weight, net.layer4[1].conv2.weight)
assert other(images).logits.shape == (2, 7)
"""
    hub.run(code)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ({"method": "HEAD", "status": 401}, "^OSError" if RESOLVES else "^$"),
        ({"method": "HEAD", "status": 403}, "^OSError" if RESOLVES else "^$"),
        ({"method": "HEAD", "path": "config.json", "status": 503, "times": 2}, "^$"),
        ({"method": "GET", "path": "model.safetensors", "status": 429, "headers": {"Retry-After": "1"}}, "^$"),
        ({"method": "GET", "path": "model.safetensors", "action": "drop"}, "^$"),
        ({"method": "GET", "path": "model.safetensors", "action": "truncate"}, "^OSError .*Consistency check"),
        ({"method": "GET", "path": "model.safetensors", "action": "corrupt"}, "^OSError .*came damaged from the Hub"),
        ({"method": "GET", "path": "exit_config.json", "action": "truncate"}, "^OSError .*Consistency check"),
        ({"method": "GET", "path": "exit_config.json", "action": "corrupt"}, "came damaged from the Hub"),
    ],
    ids=str,
)
def test_a_load_that_fails_leaves_nothing_wrong_behind(hub, checkpoint, tmp_path, fault, sentence):
    """It comes right by itself, or ends in an error, and the next one is right."""
    folder, model = checkpoint
    hub.push("alice/net", {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    hub.misbehave(**fault)
    twice = """
for _ in range(2):
    try:
        load("alice/net", sys.argv[1])
        break
    except (OSError, ValueError) as error:
        print(type(error).__name__, error)
"""
    said = hub.run(LOAD + twice, tmp_path / "answers").stdout
    assert re.search(sentence, said), said
    check(tmp_path / "answers", model)


def test_what_cannot_be_saved_leaves_no_repository(hub, checkpoint):
    folder, _ = checkpoint
    code = """
from hf_scan import ExitConfig
model.exit_config = ExitConfig(thresholds=[0.5, 0.5], criterion=lambda seen: seen[-1].amax(dim=-1))
try:
    model.push_to_hub("alice/net")
except ValueError as error:
    print(error)
"""
    assert "which cannot be saved" in hub.run(PUSH + code, folder).stdout
    assert not hub.repos


def test_a_push_that_fails_changes_nothing(hub, checkpoint):
    folder, _ = checkpoint
    hub.run(PUSH + 'model.push_to_hub("alice/net")', folder)
    before = hub.files("alice/net")
    change = (
        PUSH
        + """
import torch
from hf_scan import ExitConfig
with torch.no_grad():
    model.backbone.fc.weight.add_(1)
model.exit_config = ExitConfig(thresholds=[0.1, 0.1])
model.push_to_hub("alice/net")
"""
    )
    hub.misbehave("POST", "/commit/", status=403)
    error = hub.run(change, folder, expect_error=True)
    assert "403" in error
    assert hub.files("alice/net") == before
    # A fault of the server before the commit is waited out; of the commit itself, the client makes one attempt.
    hub.misbehave("POST", "/preupload/", status=503)
    hub.misbehave("POST", "/commit/", status=429, headers={"Retry-After": "1"})
    assert "429" in hub.run(change, folder, expect_error=True)
    assert hub.files("alice/net") == before
    hub.run(change, folder)
    after = hub.files("alice/net")
    assert json.loads(after["exit_config.json"])["thresholds"] == [0.1, 0.1]
    assert not torch.equal(
        load(after["model.safetensors"])["backbone.fc.weight"], load(before["model.safetensors"])["backbone.fc.weight"]
    )
