"""Latent codes: collecting, probing, ablating and drawing them. Probes, reports and figures need the extra `analysis`."""

from .ablation import ablate_heads, ablated, mean_codes
from .combinations import score_by_combination
from .latents import Codes, collect_codes
from .probes import code_similarity, probe
from .report import probe_report
from .subjects import task_batches


__all__ = [
    "Codes",
    "ablate_heads",
    "ablated",
    "code_similarity",
    "collect_codes",
    "mean_codes",
    "probe",
    "probe_report",
    "score_by_combination",
    "task_batches",
]
