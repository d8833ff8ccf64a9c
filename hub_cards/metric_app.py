"""The page on which the metric can be tried."""

import evaluate
from evaluate.utils import launch_gradio_widget


launch_gradio_widget(evaluate.load("{{ metric_id }}"))
