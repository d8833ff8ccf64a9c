"""Asks {{ model_id }} for the missing panel of a symbolic Raven's progressive matrix."""

import gradio as gr
from transformers import pipeline


solve = pipeline("symbolic-reasoning", model="{{ model_id }}", trust_remote_code=True)
EXAMPLE = """{{ example }}"""


def answer(puzzle: str) -> str:
    """The model's ninth panel for eight panels, one per line."""
    lines = [line.split() for line in puzzle.strip().splitlines()]
    if len(lines) != 8 or not all(word.isdecimal() for line in lines for word in line):
        raise gr.Error("Expected eight panels of whole numbers, one panel per line.")
    panels = [[int(word) for word in line] for line in lines]
    try:
        panel = solve([panels[:3], panels[3:6], [*panels[6:], None]])["answer"]
    except ValueError as error:
        raise gr.Error(str(error)) from None
    return " ".join(map(str, panel))


demo = gr.Interface(
    answer,
    gr.Textbox(EXAMPLE, lines=8, label="Eight panels, row by row"),
    gr.Textbox(label="The model's ninth panel"),
    title="Symbolic Raven's progressive matrices",
    analytics_enabled=False,
)

if __name__ == "__main__":
    demo.launch()
