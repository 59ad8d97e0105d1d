"""The notebooks run from top to bottom, in a kernel of their own."""

from importlib.util import find_spec
from pathlib import Path

import pytest


NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples" / "notebooks").glob("*.ipynb"))
MISSING = [name for name in ("ipykernel", "matplotlib", "nbclient", "nbformat") if find_spec(name) is None]

pytestmark = [pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["fine_tune", "operating_point"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert all(cell.get("outputs", []) == [] for cell in notebook.cells)  # a diff shows what was changed
    client = NotebookClient(notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()  # raises for a cell that fails
    text = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    expected = {"fine_tune": "with exits: ", "operating_point": "guaranteed: "}[path.stem]
    assert expected in text
