"""Make the two notebooks of the lecture from toy/lecture.py, their only source.

    python toy/make_lecture.py            # a few minutes: the solutions run from top to bottom
    python toy/make_lecture.py --check    # runs them, too, but writes nothing

A check makes a model of faces in a few steps, which serves as well for seeing that all cells run.

lecture.ipynb is for students. It lacks the lines between "# solution" and "# end of solution", and
the cells with the tag "solution". lecture_solutions.ipynb has them, with all outputs. Its last part
has pictures only if toy/tiny-faces is there, or if FACES names another such folder.
"""

import argparse
import importlib
import os
import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]
import diffusion_dpo as dpo
from toy import faces

SOURCE = HERE / "lecture.py"
STUDENT, SOLUTIONS = HERE / "lecture.ipynb", HERE / "lecture_solutions.ipynb"
SOLUTION = re.compile(r"^( *)# solution\n.*?\n *# end of solution$", re.M | re.S)
BRIEF = {"drawings": 4, "vae_steps": 2, "unet_steps": 2, "clip_steps": 2, "pairs": 40}  # of faces
METADATA = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"}}


def load(name):
    """A module that only the lecture needs. Raises UserError."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise dpo.UserError(f"{name} is missing: pip install -r .ci/requirements.txt") from None


def make(path):
    """The notebook STUDENT or SOLUTIONS, by toy/lecture.py, without outputs. Raises UserError."""
    book = load("jupytext").read(SOURCE)
    book.metadata = METADATA
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number}"  # jupytext's own are random
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
    if path == STUDENT:
        book.cells = [cell for cell in book.cells if "tags" not in cell.metadata]
        for cell in book.cells:
            cell.source = SOLUTION.sub(r"\1...  # your code here", cell.source)
    return book


def run(book):
    """Run all cells, and keep their outputs in the notebook. Raises UserError if one fails."""
    nbclient, config = load("nbclient"), load("traitlets.config")
    load("ipykernel")
    client = nbclient.NotebookClient(
        book, timeout=None, record_timing=False, resources={"metadata": {"path": HERE.parent}},
        config=config.Config(KernelManager={"transport": "ipc"}))  # files and not ports
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        raise dpo.UserError(f"{SOURCE.name}: a cell fails: {error.ename}: {error.evalue}") from None
    book.metadata = METADATA  # without the version of Python
    for cell in book.cells:
        if cell.cell_type == "code":  # progress bars are for those who wait
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]


def check_sources():
    """Raise UserError if a notebook has other cells than toy/lecture.py gives it."""
    for path in (STUDENT, SOLUTIONS):
        there, wanted = ([(cell.id, cell.cell_type, cell.source) for cell in book.cells]
                         for book in (load("nbformat").read(path, 4), make(path)))
        if there != wanted:
            raise dpo.UserError(f"toy/{path.name} is out of date: python toy/make_lecture.py")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="run the solutions, write nothing")
    check = parser.parse_args(argv).check
    if check:
        check_sources()

    student, solutions = make(STUDENT), make(SOLUTIONS)
    with tempfile.TemporaryDirectory() as folder:
        if check:
            os.environ["FACES"] = f"{folder}/faces"
            faces.build(Path(folder, "faces"), 0, BRIEF)
        run(solutions)
    print("lecture     every cell runs")
    if check:
        return
    for book, path in ((student, STUDENT), (solutions, SOLUTIONS)):
        with dpo.atomic_write(path) as partial:
            load("nbformat").write(book, partial)
        print(f"notebook    {path}")


if __name__ == "__main__":
    dpo.run_command(main)
