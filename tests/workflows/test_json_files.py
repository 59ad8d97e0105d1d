import pytest

from hf_scan.workflows.json_files import parse_json, read_json
from hf_scan.workflows.recipes import read_recipe


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"{", "cannot be read as JSON"), (b"[1]", "holds a list"), (b"\xff\xfe", "cannot be read"), (b"", "cannot be")],
)
def test_what_is_no_object_of_json(tmp_path, content, said):
    (tmp_path / "metrics.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"metrics\.json {said}.*; expected the figures of a run"):
        read_json(tmp_path / "metrics.json", "the figures of a run")


def test_json_that_is_there_and_json_that_is_not(tmp_path):
    assert parse_json('{"a": 1}', "`--x`", "expected arguments") == {"a": 1}
    with pytest.raises(FileNotFoundError, match=r"There is no file .*none\.json; expected the figures of a run"):
        read_json(tmp_path / "none.json", "the figures of a run")
    with pytest.raises(ValueError, match=r"`--x` cannot be read as JSON .*; expected arguments"):
        parse_json("{'a': 1}", "`--x`", "expected arguments")


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"a: b: c"])
def test_a_recipe_that_is_no_yaml(tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"The recipe .*recipe\.yaml cannot be read as YAML \(.+\); expected a line"):
        read_recipe(tmp_path / "recipe.yaml")
