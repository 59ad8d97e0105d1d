import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from hf_scan.model.image_processing_scan import create_image_processor

from ..conftest import random_scan_model


def pictures(n: int = 40, classes: int = 4, label_feature=None, mode: str = "RGB") -> DatasetDict:
    rng = np.random.default_rng(0)
    shape = (12, 10) if mode == "L" else (12, 10, 3)
    images = [PILImage.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)) for _ in range(n)]
    feature = label_feature or ClassLabel(names=[f"c{i}" for i in range(classes)])
    labels = [i % classes for i in range(n)]
    if feature == Value("string"):
        labels = [f"c{label}" for label in labels]
    features = Features({"img": Image(), "fine_label": feature, "id": Value("int64")})
    rows = Dataset.from_dict({"img": images, "fine_label": labels, "id": list(range(n))}, features=features)
    return DatasetDict(train=rows)


def colours(n: int = 12, size: int = 16) -> tuple:
    """Rows as `prepare_columns` makes them, and the processor of a network for them."""
    processor = create_image_processor(random_scan_model(image_size=size))
    rng = np.random.default_rng(0)
    images = [PILImage.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(n)]
    features = Features({"image": Image(), "labels": ClassLabel(num_classes=3)})
    return Dataset.from_dict({"image": images, "labels": [i % 3 for i in range(n)]}, features=features), processor
