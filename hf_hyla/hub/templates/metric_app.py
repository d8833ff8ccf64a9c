"""The page on which the metric can be tried."""

import json

import evaluate
import gradio as gr


metric = evaluate.load("{{ metric_id }}")
EXAMPLE = json.loads("""{{ example }}""")


def compute(*texts: str) -> dict[str, float]:
    """The scores of lists that are written as JSON."""
    try:
        return metric.compute(**{name: json.loads(text) for name, text in zip(EXAMPLE, texts, strict=True)})
    except (ValueError, TypeError, LookupError) as error:
        raise gr.Error(f"Expected lists like those of the example: {error}") from None


demo = gr.Interface(
    compute,
    [gr.Textbox(json.dumps(values), label=name) for name, values in EXAMPLE.items()],
    gr.JSON(label="Scores"),
    title="{{ title }}",
    description="{{ description }}",
    analytics_enabled=False,
)

if __name__ == "__main__":
    demo.launch()
