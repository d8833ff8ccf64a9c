"""The page of the demo: its widgets, and what they call. The other files compute and draw."""

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..tasks.logic import LogicTask
from ..tasks.sraven import RULES, SravenTask
from . import drawing, pages
from .functions import curve, term_names
from .puzzles import PANELS, Puzzle, Solver, edit, sample, verdict, with_rules
from .shown import Shown, load


# gradio reads this variable when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import gradio as gr


_CHOOSE_PANEL = """
let last = null;
const choose = event => {
  const panel = event.target.closest('[data-panel]');
  if (!panel || (event.type === 'keydown' && !['Enter', ' '].includes(event.key))) return;
  event.preventDefault();
  last = panel.dataset.panel;
  trigger('select', {index: Number(last)});
};
element.addEventListener('click', choose);
element.addEventListener('keydown', choose);
watch('value', () => { if (last !== null) element.querySelector(`[data-panel="${last}"]`)?.focus({preventScroll: true}); last = null; });
"""
# The last of several quick changes is answered too, where gradio's default would drop it.
_EVENT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "trigger_mode": "always_last"}
# Fonts that every machine has, so that nothing is fetched.
THEME = gr.themes.Base(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
LAUNCH: dict[str, Any] = {
    "theme": THEME,
    "css_paths": Path(__file__).parent / "style.css",
    "footer_links": [],
    "share": False,  # which gradio would switch on in some notebooks
}


def page(names: Sequence[str]) -> gr.Blocks:
    """
    The page for trying these models, to be launched with `LAUNCH`.

    Raises:
        ValueError, OSError: see `load`.
    """
    found, title = load(names), "Attention as a hypernetwork"
    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.Markdown(f"# {title}")
        with gr.Tabs():
            for task, models in found:
                if isinstance(task, SravenTask):
                    with gr.Tab("Puzzles", id="sraven"):
                        _puzzles(blocks, task, [Solver(one, task) for one in models])
                elif isinstance(task, LogicTask):
                    with gr.Tab("Fuzzy logic", id="logic"):
                        _functions(blocks, task, models)
        gr.Markdown(
            "[Attention as a Hypernetwork](https://arxiv.org/abs/2406.05816), ICLR 2025. Everything is computed where this "
            "page runs, and nothing is sent anywhere else."
        )
    return blocks


def _puzzles(blocks: gr.Blocks, task: SravenTask, solvers: list[Solver]) -> None:
    gr.Markdown(pages.BOARD_HELP.format(last=task.num_values - 1))
    state, selected = gr.State(), gr.State(0)
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            board = gr.HTML(js_on_load=_CHOOSE_PANEL, elem_id="board")
            with gr.Row():
                new = gr.Button("New puzzle", elem_id="new", min_width=140, size="md")
                unseen = gr.Button("Unseen combination", variant="primary", elem_id="unseen", min_width=140, size="md")
            digits = gr.Checkbox(False, label="Digits on the panels", elem_id="digits")
            shuffled = gr.Checkbox(
                False,
                label="Shuffle the features in every column" + ", as in training" * task.permute,
                elem_id="shuffle",
            )
            text = gr.Textbox(label="Digits of the framed panel", submit_btn="Change", elem_id="panel")
        with gr.Column(scale=8, min_width=320):
            with gr.Row():
                rules = [
                    gr.Dropdown(
                        list(RULES), label=f"Rule of the {name}", type="index", min_width=150, elem_id=f"rule-{i}"
                    )
                    for i, name in enumerate(drawing.feature_names(task.num_features))
                ]
            about, answers = gr.HTML(elem_id="about"), gr.HTML(elem_id="answers")
            gr.HTML(pages.legend())

    def show(puzzle: Puzzle, selected: int, digits: bool) -> dict:
        verdict_ = verdict(task, puzzle)
        found = [(solver, solver.answer(puzzle)) for solver in solvers]
        where = f"Digits of the framed panel: row {selected // 3 + 1}, column {selected % 3 + 1}"
        return {
            state: puzzle,
            board: drawing.board([*puzzle.panels[:PANELS], None], digits, selected),
            about: pages.about_puzzle(task, puzzle, verdict_, digits),
            answers: pages.answers(task, puzzle, verdict_, found, digits),
            text: gr.Textbox(" ".join(map(str, puzzle.panels[selected])), label=where),
            **{one: RULES[rule] for one, rule in zip(rules, puzzle.rules, strict=True)},
        }

    def draw(split: str) -> Callable:
        def drawn(shuffled, selected, digits):
            index = random.randrange(task.num_samples[split])
            return show(sample(task, split, index, shuffled), selected, digits)

        return drawn

    outputs = [state, board, about, answers, text, *rules]
    to_all: dict[str, Any] = {"outputs": outputs, **_EVENT}
    blocks.load(lambda *view: show(sample(task, "ood", 0, False), *view), [selected, digits], **to_all)
    new.click(draw("test"), [shuffled, selected, digits], **to_all)
    unseen.click(draw("ood"), [shuffled, selected, digits], **to_all)
    digits.input(show, [state, selected, digits], **to_all)

    @gr.on(
        [one.input for one in rules] + [shuffled.input], inputs=[state, shuffled, selected, digits, *rules], **to_all
    )
    def changed_rules(puzzle, shuffled, selected, digits, *rules):
        return show(with_rules(task, puzzle, rules, shuffled), selected, digits)

    @text.submit(inputs=[state, text, selected, digits], **to_all)
    def changed_panel(puzzle, text, selected, digits):
        try:
            return show(edit(task, puzzle, selected, text), selected, digits)
        except ValueError as error:
            raise gr.Error(str(error), title="That does not work", print_exception=False) from None

    @board.select(inputs=[state, digits], outputs=[selected, *outputs], **_EVENT)
    def chosen(puzzle, digits, event: gr.EventData):
        return {selected: event.index, **show(puzzle, event.index, digits)}


def _functions(blocks: gr.Blocks, task: LogicTask, models: list[Shown]) -> None:
    gr.Markdown(pages.LOGIC_HELP.format(shown=task.num_examples - 1))
    names, index = term_names(task), gr.State(0)
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            terms = [
                gr.Dropdown(names, label=f"{'or t' if i else 'T'}erm {i + 1}", type="index", elem_id=f"term-{i}")
                for i in range(task.num_terms)
            ]
            with gr.Row():
                new = gr.Button("New function", elem_id="new-function", min_width=140, size="md")
                unseen = gr.Button(
                    "Unseen combination", variant="primary", elem_id="unseen-function", min_width=140, size="md"
                )
            variables = [f"x{i + 1}" for i in range(task.num_variables)]
            variable = gr.Radio(
                variables, value=variables[0], label="Variable that moves", type="index", elem_id="variable"
            )
        with gr.Column(scale=8, min_width=320):
            picture = gr.HTML(elem_id="curve")

    def show(index: int, variable: int, *chosen: int) -> str:
        try:
            found = curve(task, models, chosen, index, variable)
        except ValueError as error:
            return pages.refusal(error)
        return pages.function(task, models, chosen, found, variable)

    def draw(split: str, index: int | None = None) -> Callable:
        def drawn(variable):
            number = random.randrange(task.num_samples[split]) if index is None else index
            chosen = task.samples(split, [number])["terms"][0].tolist()
            return [number, show(number, variable, *chosen), *(names[term] for term in chosen)]

        return drawn

    outputs = [index, picture, *terms]
    blocks.load(draw("ood", 0), variable, outputs, **_EVENT)
    new.click(draw("test"), variable, outputs, **_EVENT)
    unseen.click(draw("ood"), variable, outputs, **_EVENT)
    gr.on([one.input for one in [*terms, variable]], show, [index, variable, *terms], picture, **_EVENT)
