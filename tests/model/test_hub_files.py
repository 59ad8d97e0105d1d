"""Names and kinds of files, and checksums of what came from the Hub."""

import hashlib
import os

import pytest

from hf_scan.model import hub_files
from hf_scan.model.hub_files import (
    check_file_name,
    check_regular_files,
    checked_downloads,
    find_file,
)


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../config.json", "a/../../config.json", "a\\b"])
def test_names_that_lead_elsewhere(name, tmp_path):
    with pytest.raises(ValueError, match="is not the name of a file in a folder or a repository"):
        check_file_name(name)
    with pytest.raises(ValueError, match="is not the name of a file"):
        find_file(tmp_path, name)


def test_a_file_of_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "fast.json").write_text("{}")
    assert find_file(tmp_path, "fast.json", subfolder="sub") == tmp_path / "sub" / "fast.json"
    assert find_file(tmp_path, "fast.json") is None


def test_json_that_would_fill_memory(tmp_path):
    path = tmp_path / "exit_config.json"
    path.touch()
    os.truncate(path, hub_files.LARGEST_JSON)  # a hole, which takes no room
    check_regular_files(tmp_path)
    os.truncate(path, hub_files.LARGEST_JSON + 1)
    with pytest.raises(OSError, match=r"exit_config\.json has more than 67,108,864 bytes, and is not read"):
        check_regular_files(tmp_path)
    with pytest.raises(OSError, match="has more than"):
        find_file(tmp_path, "exit_config.json")


def test_damaged_downloads_are_refused_and_removed(tmp_path):
    """Files of the cache are named by their checksum: SHA-256, or git's for small ones."""
    blobs = tmp_path / "models--alice--scan" / "blobs"
    blobs.mkdir(parents=True)
    old = blobs / hashlib.sha256(b"old").hexdigest()
    old.write_bytes(b"damaged long ago")
    os.utime(old, (0, 0))
    content = b"{}"
    whole = [hashlib.sha256(content).hexdigest(), hashlib.sha1(b"blob 2\0" + content).hexdigest()]
    with checked_downloads("alice/scan", tmp_path):
        for name in whole:
            (blobs / name).write_bytes(content)
    damaged = blobs / hashlib.sha256(b"other").hexdigest()
    with (
        pytest.raises(OSError, match=r"1 of the files of alice/scan came damaged .*load the model again"),
        checked_downloads("alice/scan", tmp_path),
    ):
        damaged.write_bytes(content)
    assert {path.name for path in blobs.iterdir()} == {old.name, *whole}
