"""Run every notebook in this folder; `make notebooks` does. They are stored without output.

python examples/notebooks/run.py
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

if __name__ == "__main__":
    for path in sorted(Path(__file__).parent.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        if any(cell.get("outputs") for cell in notebook.cells):
            raise SystemExit(f"{path}: has output; clear it")
        NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
        print(f"{path.name}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells")
