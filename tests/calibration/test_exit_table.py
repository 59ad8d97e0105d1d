import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, TensorDataset

from hf_scan import ExitConfig, calibrate
from hf_scan.calibration import (
    ExitTable,
    collect_exit_logits,
)

from ..conftest import random_scan_model
from .samples import dataset, table


def test_table_holds_what_the_network_says(model, tmp_path):
    table = collect_exit_logits(model, dataset(), batch_size=32)
    with torch.no_grad():
        exit_logits = model(torch.stack([row["pixel_values"] for row in dataset()])).exit_logits
    np.testing.assert_allclose(table.logits, torch.stack(exit_logits, 1).numpy(), rtol=1e-4, atol=1e-5)
    assert table.labels.tolist() == [row["labels"] for row in dataset()]
    assert not model.training

    table.save(tmp_path / "search.safetensors")
    loaded = ExitTable.load(tmp_path / "search.safetensors")
    assert (loaded.split, loaded.fingerprint) == ("search", table.fingerprint)
    assert np.array_equal(loaded.logits, table.logits)
    # The fingerprint is the images': it does not depend on how they were batched, and other images have another.
    assert collect_exit_logits(model, dataset(), batch_size=70).fingerprint == table.fingerprint
    assert collect_exit_logits(model, dataset(seed=1)).fingerprint != table.fingerprint


def test_table_columns_leave_switched_off_exits_out_of_the_ensemble(model):
    table = collect_exit_logits(model, dataset())
    _, predictions = table.columns(ExitConfig(thresholds=[None, 0.5, 0.5]))
    assert (predictions[:, -1] == table.logits[:, 1:].mean(axis=1).argmax(-1)).all()


def test_half_precision_models_and_images(model):
    table = collect_exit_logits(random_scan_model().half(), dataset())
    assert table.logits.dtype == np.float32
    # Half precision has three digits.
    assert np.abs(table.logits - collect_exit_logits(model, dataset()).logits).mean() < 0.05


def test_pairs_of_images_and_labels(model):
    """As a list, a `TensorDataset`, and either in a `DataLoader`; labels of shape (1,) too."""
    rows = dataset()
    expected = collect_exit_logits(model, rows)
    pairs = [(row["pixel_values"], row["labels"]) for row in rows]
    tensors = TensorDataset(torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs]))
    single = [(image.numpy(), torch.tensor([label])) for image, label in pairs]
    for rows_given in (pairs, tensors, single, DataLoader(pairs, batch_size=7, shuffle=True), DataLoader(tensors)):
        table = collect_exit_logits(model, rows_given)
        assert np.array_equal(table.logits, expected.logits)
        assert np.array_equal(table.labels, expected.labels)
        assert table.fingerprint == expected.fingerprint
    loader = DataLoader(rows, batch_size=7, shuffle=True)
    assert np.array_equal(collect_exit_logits(model, loader).logits, expected.logits)
    assert calibrate(model, pairs, max_macs=7e6).rule == calibrate(model, rows, max_macs=7e6).rule


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        (None, TypeError, "is a NoneType; expected a dataset with a length"),
        ("table.safetensors", TypeError, "is a str; expected a dataset"),
        ([], ValueError, "split is empty"),
        ([(torch.zeros(3, 16, 16), 1, 2)], TypeError, "rows of type tuple; expected dictionaries"),
        ([("cat.png", 1)], TypeError, "pairs of a str and a label; expected the image as a tensor"),
        ([(torch.zeros(3, 16, 16), "cat")], ValueError, "labels such as 'cat'; expected class indices"),
        ([(torch.zeros(3, 16, 16), 0.5)], ValueError, r"labels of type float64 and shape \(1,\) for 1 images"),
        ([(torch.zeros(3, 16, 16), torch.ones(4))], ValueError, r"labels of type float32 and shape \(1, 4\)"),
        ([{"image": 1, "labels": 1}], ValueError, r"rows of \['image', 'labels'\]; expected `pixel_values`"),
        ([{"pixel_values": torch.zeros(3, 16, 16)}], ValueError, r"rows of \['pixel_values'\]; expected"),
        ([{"pixel_values": torch.zeros(3, 16, 16), "labels": "cat"}], ValueError, "labels such as 'cat'"),
    ],
)
def test_rows_that_will_not_do(model, rows, kind, message):
    with pytest.raises(kind, match=message):
        collect_exit_logits(model, rows)


def test_tables_that_are_none(model, tmp_path):
    table = collect_exit_logits(model, dataset(12))
    table.save(tmp_path / "new" / "search.safetensors")
    whole = (tmp_path / "new" / "search.safetensors").read_bytes()
    for number, content in enumerate((b"junk", whole[:-8], whole.replace(b"exit_table", b"exit_stool"))):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="does not hold a whole table of exit logits"):
            ExitTable.load(path)
    with pytest.raises(ValueError, match="do not belong together"):
        ExitTable(table.logits, table.labels[:5], table.samples, "search", table.model)


def test_halves_keep_what_is_there_twice_together():
    rows = table(100)
    twice = rows.select(np.r_[np.arange(100), np.arange(0, 100, 2)])
    first, second = twice.halves(("a", "b"), seed=3)
    assert len(first) + len(second) == 150
    assert not set(first.samples.tolist()) & set(second.samples.tolist())
    assert (first.split, second.split) == ("a", "b")


def test_a_fingerprint_does_not_depend_on_the_order_or_on_the_transform(network):
    rows = Dataset.from_dict({"image": [[float(i)] * 768 for i in range(30)], "labels": [i % 3 for i in range(30)]})

    def prepare(scale):
        return lambda batch: {
            "pixel_values": [torch.tensor(values).view(3, 16, 16) * scale for values in batch["image"]],
            "labels": batch["labels"],
        }

    plain = collect_exit_logits(network, rows.with_transform(prepare(0.1)))
    other = collect_exit_logits(network, rows.shuffle(seed=0).with_transform(prepare(0.2)))
    assert plain.fingerprint == other.fingerprint
    assert (
        plain.fingerprint
        != collect_exit_logits(network, rows.select(range(29)).with_transform(prepare(1.0))).fingerprint
    )
