"""What the demo's page says and shows, as HTML made from what was computed."""

from html import escape

from ..tasks.logic import LogicTask
from ..tasks.sraven import RULES, SravenTask
from . import drawing
from .functions import Curve, status
from .puzzles import Answer, Puzzle, Solver, Verdict, seen
from .shown import Shown


_MARKS = {"right": "✓ Right", "possible": "≈ Possible, but another one counts as right", "wrong": "✗ Wrong"}

BOARD_HELP = """\
1. Which panel is missing? Every row follows the same rules: one for the **shape**, one for the **size**, one for the **colour** and one for the **number**.
2. The models read eight panels as digits and answer with the ninth. Some combinations of rules were held out of their training: try an *unseen combination*.
3. Change a rule, or click a panel and type other digits: answers and codes follow. Features run from 0 to {last}, and after {last} comes 0.
4. The coloured cells are the model's **latent code**, the attention scores of all heads; a linear probe reads the rule from them."""
LOGIC_HELP = """\
1. A **fuzzy logic function** is the *or* of terms, each of which is the *and* of all variables, plain or negated. *And* is the minimum, *or* is the maximum, and *not x* is 1 − x.
2. The models are shown {shown} random points with the function's values, and asked for other points. They are never told the terms.
3. Choose terms, and the variable that moves. Some combinations of terms were held out of training: try an *unseen combination*.
4. The closer a line is to the broad grey one, the better the model has understood the function."""


def about_puzzle(task: SravenTask, puzzle: Puzzle, verdict: Verdict, digits: bool) -> str:
    """The right answer, whether the combination of rules was trained, and the ideal observer's verdict."""
    if puzzle.edited:
        kind, words = "edited", "You changed a panel: the rules may no longer hold."
    elif seen(task, puzzle.rules):
        kind, words = "trained", "Trained combination: other puzzles by these rules were in the training data."
    else:
        kind, words = "unseen", "Unseen combination: no training puzzle has these rules together."
    right = ""
    if verdict.right is not None:
        drawn = drawing.svg(100, 100, drawing.panel(verdict.right, digits), drawing.described(verdict.right))
        right = f'<figure class="hyla-right">{drawn}<figcaption>right answer</figcaption></figure>'
    return (
        f'<div class="hyla-about" role="status">{right}<div><p class="hyla-badge {kind}">{words}</p>'
        f"<p><b>Ideal observer:</b> {escape(verdict.words())}</p></div></div>"
    )


def answers(
    task: SravenTask, puzzle: Puzzle, verdict: Verdict, found: list[tuple[Solver, Answer]], digits: bool
) -> str:
    """What each model answers, side by side."""
    return f'<div class="hyla-models">{"".join(_model(task, puzzle, verdict, *one, digits) for one in found)}</div>'


def _model(task, puzzle: Puzzle, verdict: Verdict, solver: Solver, answer: Answer, digits: bool) -> str:
    mark = verdict.mark(answer.panel)
    drawn = drawing.svg(
        100, 100, drawing.panel(answer.panel, digits, mark), f"{_MARKS[mark]}: {drawing.described(answer.panel)}"
    )
    right = "" if verdict.right is None else f", right is <b>{' '.join(map(str, verdict.right))}</b>"
    rows = []
    for feature, name in enumerate(drawing.feature_names(task.num_features)):
        value = None if verdict.right is None else verdict.right[feature]
        true = None if puzzle.edited else puzzle.rules[feature]
        told = int(answer.rules[feature].argmax())
        sign = "" if value is None else _sign(answer.panel[feature] == value)
        codes = answer.codes[:, feature].tolist()
        rows.append(
            f'<div class="hyla-feature"><div class="name"><span><b>{name}</b> {sign}</span><span>code: <b>{RULES[told]}</b> '
            f"{answer.rules[feature, told]:.0%} {'' if true is None else _sign(told == true)}</span></div>"
            f"{drawing.bars(answer.probabilities[feature].tolist(), answer.panel[feature], value)}"
            f"{drawing.heat_map(codes, solver.scales.tolist(), f'latent code of {name}')}</div>"
        )
    return (
        f'<section class="hyla-model"><h3>{escape(solver.shown.title)}</h3>'
        f'<div class="hyla-answer">{drawn}<div><p class="mark {mark}">{_MARKS[mark]}</p>'
        f"<p>answers <b>{' '.join(map(str, answer.panel))}</b>{right}</p></div></div>{''.join(rows)}"
        f'<p class="note">{escape(solver.shown.accuracy())} The probe is right for {solver.probe_accuracy:.0%} of the rules of '
        f"unseen combinations.</p></section>"
    )


def _sign(right: bool) -> str:
    return '<span class="right">✓</span>' if right else '<span class="wrong">✗</span>'


def legend() -> str:
    return (
        '<p class="note">Bars: probability of each digit; the dark bar is the answer, the framed one is right. '
        "Code: the rule that the probe reads from the cells. Cells: rows are layers, columns heads, and the two blocks are the first and the second panel of the last row, "
        "which the answer is read from; blue is below 0, orange above.</p>"
    )


def function(task: LogicTask, models: list[Shown], terms: tuple[int, ...], found: Curve, variable: int) -> str:
    """The curve of answers, and how close they are."""
    where = ", ".join(f"x{i + 1} = {value:.2f}" for i, value in enumerate(found.point.tolist()) if i != variable)
    picture = drawing.curve(
        found.x.tolist(),
        found.truth.tolist(),
        {name: values.tolist() for name, values in found.answers.items()},
        f"x{variable + 1}, with {where}",
    )
    scores = "".join(
        f"<p><b>{escape(one.title)}</b>: R² {found.r2[one.title]:.3f} for this function, over random points. "
        f'<span class="note">All functions: {escape(one.accuracy())}</span></p>'
        for one in models
    )
    return f'<p class="hyla-badge" role="status">{status(task, terms)}</p>{picture}{scores}'


def refusal(error: Exception) -> str:
    """In place of a curve, what must be changed."""
    return f'<p class="hyla-badge edited" role="alert">{escape(str(error))}</p>'
