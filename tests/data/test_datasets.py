import numpy as np
import pytest
import torch
from transformers import Trainer

from hf_scan import ScanTrainer, ScanTrainingArguments
from hf_scan.data import (
    EpochCallback,
    ImagesInMemory,
    SeededImages,
    eval_transform,
    train_transform,
)

from ..conftest import random_scan_model
from .samples import colours


def test_images_in_memory_without_augmentation_are_those_of_evaluation():
    rows, processor = colours()
    rows_in_memory = ImagesInMemory(rows, processor, crop="none", flip=False)
    expected = rows.with_transform(eval_transform(processor))
    assert len(rows_in_memory) == 12
    for index in range(12):
        row = rows_in_memory[index]
        assert row["labels"] == index % 3
        assert (row["pixel_values"] - expected[index]["pixel_values"]).abs().max() < 2 / 255 / min(processor.image_std)


def test_images_in_memory_are_cropped_and_mirrored_each_on_its_own():
    """Each is a part of its padded image, which one can find; all places and both directions occur."""
    rows, processor = colours()
    plain = torch.stack([row["pixel_values"] for row in ImagesInMemory(rows, processor, crop="none", flip=False)])
    black = -torch.tensor(processor.image_mean) / torch.tensor(processor.image_std)
    padded = black[None, :, None, None].repeat(12, 1, 20, 20)
    padded[..., 2:18, 2:18] = plain
    torch.manual_seed(0)
    dataset = ImagesInMemory(rows, processor, crop="pad", flip=True)
    seen = set()
    for _ in range(20):
        for index, row in enumerate(dataset.__getitems__(list(range(12)))):
            places = [
                (top, left, mirrored)
                for top in range(5)
                for left in range(5)
                for mirrored in (False, True)
                if torch.allclose(
                    row["pixel_values"].flip(-1) if mirrored else row["pixel_values"],
                    padded[index, :, top : top + 16, left : left + 16],
                    atol=1e-5,
                )
            ]
            assert len(places) == 1
            seen.update(places)
    assert len(seen) == 50
    batch = dataset.__getitems__([3] * 12)
    assert len({tuple(row["pixel_values"].flatten().tolist()) for row in batch}) > 6


def test_alternating_flips_mirror_each_image_every_second_epoch():
    rows, processor = colours()
    plain = ImagesInMemory(rows, processor, crop="none", flip=False).__getitems__(list(range(12)))
    dataset = SeededImages(ImagesInMemory(rows, processor, crop="none", flip="alternating"), seed=0)
    mirrored = []
    for epoch in range(4):
        dataset.set_epoch(epoch)
        for row, before in zip(dataset.__getitems__(list(range(12))), plain):
            flipped = torch.equal(row["pixel_values"], before["pixel_values"].flip(-1))
            assert flipped or torch.equal(row["pixel_values"], before["pixel_values"])
            mirrored.append(flipped)
    first, second, third, fourth = (mirrored[start : start + 12] for start in range(0, 48, 12))
    assert 0 < sum(first) < 12
    assert second == fourth == [not flipped for flipped in first]
    assert third == first


def test_images_grow_with_the_epochs():
    """Each size for an equal part of the epochs, and the last one for those after."""
    rows, processor = colours()
    dataset = SeededImages(ImagesInMemory(rows, processor, pixels=[8, 12, 16], num_epochs=6), seed=0)
    sizes = []
    for epoch in range(7):
        dataset.set_epoch(epoch)
        sizes.append(dataset[0]["pixel_values"].shape[-1])
    assert sizes == [8, 8, 12, 12, 16, 16, 16]


def test_further_augmentation_is_the_same_in_memory_and_by_the_image():
    rows, processor = colours()
    settings = {"crop": "none", "flip": False, "auto_augment": "cifar10", "erase": 0.25}
    torch.manual_seed(0)
    expected = rows.with_transform(train_transform(processor, **settings))[0]["pixel_values"]
    torch.manual_seed(0)
    found = ImagesInMemory(rows, processor, **settings)[0]["pixel_values"]
    assert (found - expected).abs().max() < 2 / 255 / min(processor.image_std)
    blank = (found == 0).all(dim=0)
    assert blank.sum() == 64  # a quarter of 16 x 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": "resized"}, "`crop` is 'resized'; images in memory are cropped as 'pad' or 'none'"),
        ({"auto_augment": "svhn"}, r"`auto_augment` is 'svhn'; expected 'none' or one of \['cifar10', 'imagenet'\]"),
        ({"erase": 1.0}, "`erase` is 1.0; expected a share of the image's area"),
        ({"flip": "always"}, "`flip` is 'always'; expected true, false or 'alternating'"),
        ({"pixels": [8, 32]}, r"`pixels` is \[8, 32\]; expected numbers of 1 to the images' own 16"),
    ],
)
def test_augmentation_that_does_not_exist(settings, message):
    with pytest.raises(ValueError, match=message):
        ImagesInMemory(*colours(), **settings)


def test_images_of_other_shapes_are_not_for_memory():
    rows, processor = colours()
    wide = rows.map(lambda row: {"image": row["image"].resize((24, 16))})
    with pytest.raises(ValueError, match=r"Image 0 is \(16, 24\) pixels once resized; .* squares of 16"):
        ImagesInMemory(wide, processor)


def test_seeded_images_depend_on_seed_epoch_and_batch_only():
    """Not on what was drawn before, nor do they draw from what others use."""
    rows, processor = colours()

    def batch(seed, epoch, indices, in_memory=True):
        images = ImagesInMemory(rows, processor) if in_memory else rows.with_transform(train_transform(processor))
        dataset = SeededImages(images, seed)
        dataset.set_epoch(epoch)
        assert len(dataset) == 12
        return torch.stack([row["pixel_values"] for row in dataset.__getitems__(indices)])

    for in_memory in (True, False):
        torch.manual_seed(0)
        first = batch(1, 2, [3, 4, 5], in_memory)
        state = torch.get_rng_state()
        torch.manual_seed(7)
        assert torch.equal(first, batch(1, 2, [3, 4, 5], in_memory))
        torch.manual_seed(0)
        assert torch.equal(torch.get_rng_state(), state)
        for other in ((2, 2, [3, 4, 5]), (1, 3, [3, 4, 5])):
            assert not torch.equal(first, batch(*other, in_memory))


@pytest.mark.parametrize("trainer_class", [ScanTrainer, Trainer])
def test_a_trainer_tells_seeded_images_the_epoch(tmp_path, trainer_class):
    """Also one that was resumed in the middle of an epoch, and one that is no `ScanTrainer`."""
    dataset = SeededImages(ImagesInMemory(*colours()), seed=0)
    drawn = []
    getitems = dataset.__getitems__
    dataset.__getitems__ = lambda indices: drawn.append((dataset.epoch, *indices)) or getitems(indices)
    settings = {"max_steps": 7, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 5}
    args = ScanTrainingArguments(tmp_path, **settings, use_cpu=True, disable_tqdm=True)
    callbacks = [EpochCallback(dataset)] if trainer_class is Trainer else None
    trainer = trainer_class(random_scan_model(), args, train_dataset=dataset, callbacks=callbacks)
    trainer.train()
    assert [epoch for epoch, *_ in drawn][:7] == [0, 0, 0, 1, 1, 1, 2]
    whole, drawn[:] = drawn[:], []
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert drawn[:2] == whole[5:7]


def test_workers_that_outlive_an_epoch_are_refused(tmp_path):
    settings = {"dataloader_persistent_workers": True, "dataloader_num_workers": 1, "max_steps": 1}
    args = ScanTrainingArguments(tmp_path, **settings, use_cpu=True, disable_tqdm=True)
    dataset = SeededImages(ImagesInMemory(*colours()), seed=0)
    with pytest.raises(ValueError, match="`dataloader_persistent_workers` is set"):
        ScanTrainer(random_scan_model(), args, train_dataset=dataset).train()


def test_augmentation_does_not_rest_on_how_python_hashes():
    """The same numbers with every version: this is what the run of another machine or release draws."""
    dataset = SeededImages([], seed=1)
    dataset.set_epoch(2)
    drawn = []
    dataset.rows = type("Rows", (), {"__getitems__": lambda _, indices: drawn.append(torch.initial_seed())})()
    dataset.__getitems__([3, 4, 5])
    assert drawn == [int(np.random.SeedSequence([1, 2, 3, 4, 5]).generate_state(1, np.uint64)[0])]
