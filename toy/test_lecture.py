"""Tests of the lecture, without running its notebooks. Each docstring is one claim."""

import pytest

import diffusion_dpo as dpo

for needed in ("jupytext", "nbformat"):
    pytest.importorskip(needed)
import make_lecture


@pytest.fixture(scope="module")
def cells():
    """The code cells of the student's notebook."""
    book = make_lecture.make(make_lecture.STUDENT)
    return [cell.source for cell in book.cells if cell.cell_type == "code"]


def exercise(cells, number):
    """The cell to fill, and the cell that checks it."""
    (place,) = (i for i, cell in enumerate(cells) if f'print("Exercise {number}: right.' in cell)
    return cells[place - 1:place + 1]


def test_the_notebooks_are_up_to_date():
    """The notebooks in this folder have the cells that lecture.py gives them."""
    make_lecture.check_sources()


def test_students_get_no_solution(cells):
    """The student's notebook has eight exercises to fill, and neither solutions nor answers."""
    for number in range(1, 9):
        assert "...  # your code here" in exercise(cells, number)[0]
    assert "# solution" not in "".join(cells)
    assert "**Answer.**" not in str(make_lecture.make(make_lecture.STUDENT))


WRONG = {1: ("return torch.sigmoid(reward_1 - reward_0)", "difference round"),
         2: ("return ref_err_w - err_w", "two things"),
         3: ("return (mean - other_mean).square().sum()", "each row"),
         4: ("return 0.5 * dpo.pair_errors(task, x_w, x_l, *draw_w, {})[0]", "four errors"),
         5: ("return -F.logsigmoid(logits).mean()", "losses are equal")}


def test_checks_say_what_is_wrong(cells):
    """Without an answer or with a wrong one, the check of an exercise says what to do."""
    (imports,) = (cell for cell in cells if "import diffusion_dpo as dpo" in cell)
    toy = dpo.Toy(dpo.parse(["--toy"]))
    space = {"toy": toy, "young": toy, "x_w": toy.pairs.x_w, "x_l": toy.pairs.x_l}
    exec(imports, space)
    for number in range(1, 9):
        fill, check = exercise(cells, number)
        wrong, message = WRONG.get(number, ("...", "nothing yet"))
        for answer, expected in (("...", "nothing yet"), (wrong, message)):
            exec(fill.replace("...  # your code here", answer), space)
            with pytest.raises(AssertionError, match=expected):
                exec(check, space)
