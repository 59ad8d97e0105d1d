"""Errors that say what could not be written, and to whom."""

import errno
import json

import pytest
from huggingface_hub.errors import HFValidationError

from hf_scan import ExitConfig
from hf_scan.model.named_errors import named_download_errors, named_full_disk, named_push_errors, write_whole

from ..conftest import full_disk


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EDQUOT, "used up"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file data/3"),
    ],
)
def test_a_full_disk_is_named(error):
    with (
        pytest.raises(
            OSError, match=r"out could not be written: the disk is full, and all is lost\. Make space"
        ) as it,
        named_full_disk("out", "all is lost"),
    ):
        raise error
    assert it.value.errno in (errno.ENOSPC, errno.EDQUOT)


def test_other_errors_are_left_as_they_are():
    with pytest.raises(PermissionError, match=r"^no$"), named_full_disk("out", "all is lost"):
        raise PermissionError("no")


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "exit_config.json"
    ExitConfig(thresholds=[0.5]).save_pretrained(tmp_path)
    before = path.read_bytes()
    with full_disk(10), pytest.raises(OSError, match=r"exit_config\.json could not be written: the disk is full"):
        ExitConfig(thresholds=[0.6]).save_pretrained(tmp_path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    write_whole(path, "{}")
    (tmp_path / "other").write_text("")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


class HttpError(ValueError):
    """As `BadRequestError` of the client, which is a `ValueError` too."""

    request = None


@pytest.mark.parametrize(
    "error",
    [ConnectionError("line 1\nline 2"), HttpError("400"), json.JSONDecodeError("Expecting value", "<html>", 0)],
)
def test_errors_of_the_hub_are_one_sentence(error):
    for named, words in (
        (named_push_errors, "could not be pushed to"),
        (named_download_errors, "could not be loaded"),
    ):
        with (
            pytest.raises(
                OSError, match=rf"^org/net {words} \({type(error).__name__}: [^\n]+\)\. Check the name"
            ) as it,
            named("org/net"),
        ):
            raise error
        assert len(str(it.value).splitlines()) == 1


def test_errors_of_arguments_are_left_as_they_are():
    for error in (HFValidationError("Repo id must be ..."), TypeError("unexpected keyword")):
        with pytest.raises(type(error)), named_push_errors("org/net"):
            raise error
