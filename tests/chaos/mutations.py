"""Configurations that are changed at random, and what loading them does: `python -m tests.chaos.mutations`.

Each load has 20 seconds and 4 GB. What would run code, open a connection or start a process is recorded by Python's
audit hook; what a file names to be run leaves a mark, which is looked for.
"""

import inspect
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm

from hf_scan import ExitConfig, ScanForImageClassification

from ..conftest import random_scan_model


SECONDS, BYTES = 20, 4 * 2**30
NAMES = timm.list_models()
ARGUMENTS = sorted(
    {name for model in ("resnet50", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto")
     for entry in type(timm.create_model(model)).__mro__[:-1]
     for name in inspect.signature(entry.__init__).parameters if name != "self"}
)  # fmt: skip
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pickle.find_class")
NUMBERS = (0, 1, -1, 2, 3, 0.5, 7, 1000, 65536, 2**31, 2**63, 10**30, -(10**9), 1e308, float("inf"), float("nan"))
TEXTS = (
    "",
    " ",
    "x",
    "0",
    "../../x",
    "/dev/zero",
    "hf-hub:a/b",
    "local-dir:/",
    "a/b",
    "x" * 10**5,
    "\x00",
    "\ud800",
    "None",
)
KEYS = (
    *("pretrained", "checkpoint_path", "pretrained_cfg", "features_only", "auto_map", "attn_implementation", "dtype"),
    *("_attn_implementation", "experts_implementation", "torch_dtype", "quantization_config", "transformers_version"),
    *("model_type", "architectures", "num_labels", "return_dict", "use_return_dict", "output_hidden_states"),
    *("problem_type", "exit_points", "head_width", "image_size", "num_channels", "truncated", "label2id", "id2label"),
    *("output_attentions", "chunk_size_feed_forward", "tie_word_embeddings", "name_or_path", "_name_or_path"),
    *("transformers_weights", "base_model_tp_plan", "custom_pipelines", "is_encoder_decoder", "pruned_heads"),
    "head_feature_size",
)


def any_value(chance: random.Random, depth: int = 0) -> Any:
    """Return a value of JSON that a configuration may not expect."""
    kind = chance.choice(("number", "text", "bool", "none", "list", "dict", "model"))
    if kind == "number":
        return chance.choice(NUMBERS)
    if kind == "text":
        return chance.choice(TEXTS)
    if kind == "list":
        length = chance.choice((0, 1, 2, 3, 1000 if depth == 0 else 2))
        return [any_value(chance, depth + 1) for _ in range(length)] if depth < 3 else []
    if kind == "dict":
        keys = [chance.choice((*KEYS, *TEXTS[:6], "0", "1")) for _ in range(chance.choice((0, 1, 2)))]
        return {key: any_value(chance, depth + 1) for key in keys} if depth < 3 else {}
    if kind == "model":
        return chance.choice(NAMES)
    return chance.choice((True, False)) if kind == "bool" else None


def mutate(values: dict[str, Any], chance: random.Random) -> tuple[str, str, str]:
    """Change a configuration; how, which field, and the JSON."""
    kind = chance.choice(("replace", "replace", "replace", "add", "argument", "backbone", "delete", "nest", "bytes"))
    field = chance.choice(sorted(values))
    if kind == "argument" and "backbone_kwargs" not in values:
        kind = "replace"
    if kind == "replace":
        values[field] = any_value(chance)
    elif kind == "add":
        field = chance.choice(KEYS)
        values[field] = any_value(chance)
    elif kind == "argument":
        field = "backbone_kwargs"
        values[field] = {chance.choice(ARGUMENTS): any_value(chance) for _ in range(chance.choice((1, 1, 2)))}
    elif kind == "backbone":
        field = "backbone" if "backbone" in values else "criterion"
        values |= {field: chance.choice(NAMES)}
        values |= {"exit_points": None, "image_size": chance.choice((None, 16, 224))} if field == "backbone" else {}
    elif kind == "delete":
        del values[field]
    elif kind == "nest" and isinstance(values[field], (dict, list)) and values[field]:
        inner = values[field]
        values[field] = (
            {**inner, chance.choice(sorted(inner)): any_value(chance)}
            if isinstance(inner, dict)
            else [any_value(chance), *inner[1:]]
        )
    text = json.dumps(values)
    if kind == "bytes":
        field = ""
        at = chance.randrange(len(text))
        text = (
            text[:at]
            + chance.choice(("", "\x00", "[", "}", '"', "9", text[: chance.randrange(len(text))]))
            + text[at + 1 :]
        )
    return kind, field, text


def outcome(folder: Path, file: str, kind: str, field: str) -> tuple[str, str]:
    """Load a folder, and say what happened: `loaded`, `refused`, or what should not have been."""

    def late(*_: object) -> None:
        raise SystemExit("late")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        ScanForImageClassification.from_pretrained(folder)
        return "loaded", ""
    except SystemExit:
        return "too slow", ""
    except MemoryError:
        return "too large", ""
    except (ValueError, OSError, RuntimeError) as error:
        said = str(error)
        if "can't allocate memory" in said or "Cannot allocate memory" in said:
            return "too large", said[:300]
        if file not in said and "index" not in said:
            return "no file is named", f"{type(error).__name__}: {said[:600]}"
        if len(said) > 3000:
            return "no sentence", f"{len(said)} characters: {said[:300]}"
        # Bytes that are no JSON have no field; a network of other shapes is named by what does not fit.
        # Transformers keeps some fields with an underscore in front, and names them without.
        # A backbone of another name is refused for exit points that it lacks.
        words = (field, field.lstrip("_"), "instead of", "its weights do not hold", "weights hold")
        words += ("`exit_points` holds",) if field == "backbone" else ()
        named = any(word in said for word in words)
        if kind not in ("bytes", "delete") and not named:
            return "no field is named", f"{type(error).__name__}: {said[:600]}"
        return "refused", f"{type(error).__name__}: {said[:160]}"
    except BaseException as error:
        return "no sentence", f"{type(error).__name__}: {str(error)[:600]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def watch(events: list[str], folder: Path) -> None:
    """Record what would run code."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN):
            events.append(f"{event} {str(arguments)[:200]}")
        if event == "import" and arguments[1] and str(folder) in str(arguments[1]):
            events.append(f"{event} {str(arguments)[:200]}")

    sys.addaudithook(hook)


def results(seed: int, numbers: range) -> Iterator[dict[str, Any]]:
    """Yield what each of the mutated configurations did."""
    with tempfile.TemporaryDirectory() as scratch:
        original, folder = Path(scratch, "original"), Path(scratch, "model")
        model = random_scan_model()
        model.exit_config = ExitConfig(thresholds=[0.5, 0.5], search={"method": "exact"}, trained_on="3: abc")
        model.save_pretrained(original)
        mark = Path(scratch, "mark")
        (original / "evil.py").write_text(f"import os; os.mkdir({str(mark)!r})\nclass Evil: pass\n")
        events: list[str] = []
        watch(events, folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        for number in numbers:
            chance = random.Random(seed * 10**6 + number)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(original, folder, copy_function=os.link)
            file = chance.choices(("config.json", "exit_config.json"), (4, 1))[0]
            kind, field, text = mutate(json.loads((folder / file).read_text()), chance)
            (folder / file).unlink()
            (folder / file).write_bytes(text.encode("utf-8", errors="surrogatepass"))
            begin = time.monotonic()
            found, said = outcome(folder, file, kind, field)
            if events or mark.exists():
                found, said = "code was run", str(events)
                events.clear()
            seconds = time.monotonic() - begin
            yield {
                **{"number": number, "file": file, "kind": kind, "field": field, "found": found, "said": said},
                **{"seconds": round(seconds, 2), "text": text[:3000] if found not in ("loaded", "refused") else ""},
            }


if __name__ == "__main__":
    first, last = int(sys.argv[2]), int(sys.argv[3])
    with Path(sys.argv[4]).open("a") as lines:
        for result in results(int(sys.argv[1]), range(first, last)):
            lines.write(json.dumps(result) + "\n")
            lines.flush()
