"""Images of any depth, and files that are none."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from hf_scan.model.image_files import eight_bits, read_image


PIXELS = np.random.default_rng(0).integers(0, 256, (16, 12), dtype=np.uint8)
PIXELS[0, 0], PIXELS[0, 1] = 0, 255


def scaled(dtype: str) -> np.ndarray:
    """The same picture in another type, in that type's own range."""
    if dtype in ("uint16", "<u2", ">u2"):
        return (PIXELS.astype(np.uint16) * 257).astype(dtype)
    if dtype == "0..1":
        return PIXELS.astype(np.float32) / 255
    return PIXELS.astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "int64", "float32", "float64", "0..1"])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_arrays_and_tensors_of_any_depth(dtype, kind):
    found = eight_bits(kind(scaled(dtype)))
    assert type(found) is type(kind(PIXELS))
    np.testing.assert_allclose(np.asarray(found).astype(np.float64), PIXELS, atol=1e-4)


@pytest.mark.parametrize("dtype", ["uint8", "<u2", ">u2", "int32", "float32", "0..1"])
def test_pictures_of_any_depth(dtype):
    found = eight_bits(Image.fromarray(scaled(dtype)))
    assert found.mode == "L"
    assert np.array_equal(np.asarray(found), PIXELS)


def test_truth_values_are_black_and_white():
    assert eight_bits(PIXELS > 100).tolist() == ((PIXELS > 100) * 255).tolist()
    assert eight_bits(torch.from_numpy(PIXELS > 100)).max() == 255


@pytest.mark.parametrize("values", [[0, 256], [-1, 5], [0, np.nan], [0, np.inf]])
@pytest.mark.parametrize("kind", ["array", "tensor", "picture"])
def test_values_without_a_known_range_are_refused(values, kind):
    pixels = np.array([values], dtype=np.float32)
    image = {"array": pixels, "tensor": torch.from_numpy(pixels), "picture": Image.fromarray(pixels)}[kind]
    with pytest.raises(ValueError, match=r"^An image of .* holds values from .*; expected values from 0 to 255"):
        eight_bits(image)


def test_arrays_that_the_processor_does_not_divide_are_left_alone():
    pixels = scaled("0..1")
    assert eight_bits(pixels, do_rescale=False) is pixels
    assert eight_bits("a path") == "a path"
    assert eight_bits(np.zeros((0, 3), dtype=np.int32)).shape == (0, 3)


def test_a_file_is_read_upright_and_with_8_bits(tmp_path):
    deep = Image.fromarray(scaled("uint16"))
    deep.save(tmp_path / "deep.png")
    turned = Image.fromarray(PIXELS)
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was turned
    turned.save(tmp_path / "turned.png", exif=exif)
    content = base64.b64encode((tmp_path / "deep.png").read_bytes()).decode()
    sources = [tmp_path / "deep.png", str(tmp_path / "deep.png"), deep, content, f"data:image/png;base64,{content}"]
    for source in sources:
        found = read_image(source)
        assert found.mode == "RGB"
        assert np.array_equal(np.asarray(found)[..., 0], PIXELS)
    assert np.array_equal(np.asarray(read_image(tmp_path / "turned.png"))[..., 0], np.rot90(PIXELS, -1))


@pytest.mark.parametrize(
    ("damage", "opened"),
    [
        *((damage, False) for damage in ("empty", "text", "truncated", "bad checksum", "a folder")),
        *((damage, True) for damage in ("truncated", "bad checksum")),  # PIL opens them, and reads later
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, opened):
    path = tmp_path / "cat.png"
    content = io.BytesIO()
    Image.fromarray(PIXELS).save(content, format="PNG")
    whole = content.getvalue()
    damaged = {"empty": b"", "text": b"a text", "truncated": whole[:-60], "bad checksum": whole[:60] + whole[62:]}
    if damage == "a folder":
        path.mkdir()
    else:
        path.write_bytes(damaged[damage])
    source = Image.open(path) if opened else path
    with pytest.raises(OSError, match=r"cat\.png cannot be read as an image \(.+\)\. Repair or replace it\."):
        read_image(source)


def test_what_is_no_image(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*none\.png; expected an image file, a URL"):
        read_image(tmp_path / "none.png")
    with pytest.raises(OSError, match=r"^AAAA cannot be read as an image"):
        read_image("AAAA")
    with pytest.raises(OSError, match=r"^(A){200}\.\.\. cannot be read as an image") as raised:
        read_image("A" * 10**6)
    assert len(str(raised.value)) < 700
    with pytest.raises(TypeError, match="An image is given as int; expected a file"):
        read_image(3)
    Image.fromarray(np.array([[1e6]], dtype=np.float32)).save(tmp_path / "deep.tiff")
    with pytest.raises(ValueError, match=r"deep\.tiff cannot be used: An image of mode 'F' holds values from 1e\+06"):
        read_image(tmp_path / "deep.tiff")
