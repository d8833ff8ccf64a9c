"""The figures of a probe report, as PNG files, in colours that colour-blind readers can tell apart."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..tasks import Subject
from ..utils import ATTENTION_NAMES
from .latents import Codes


# Okabe and Ito's colours, with a wine red in place of their yellow, which is hard to tell from orange and from white. Each class
# also has its own marker.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#882255")
_MARKERS = "osD^vP*X"
# The width of every figure in inches, at 120 dots per inch. A card shows it without shrinking the letters.
_WIDTH = 8
_SHADES = "cividis"
_METRICS = {"accuracy": "accuracy", "f1": "F1", "r2": "R²"}
# The number of points of a map, for which t-SNE takes a few seconds.
_POINTS = 1_500
# The number of terms with a map of their own, which are those that probes read best.
_SHOWN_LABELS = 3


def draw(report: dict[str, Any], codes: Codes, subjects: list[Subject], output: Path, progress: bool) -> list[str]:
    """
    Draws a report and the codes of its split into a folder.

    Returns:
        The names of the files: `probes.png`, `similarity.png`, `ablation.png` if heads were ablated, and `map_layer_<n>.png` for
            layers whose codes differ at all.
    """
    figures = {"probes.png": _probes(report), "similarity.png": _similarity(report)}
    if report["ablation"]:
        figures["ablation.png"] = _ablation(report)
    # Functions that are asked for the same point have the same code in the first layer, which leaves nothing to map but rounding.
    spread = np.ptp(codes.codes, axis=0).max(axis=(1, 2, 3)) / np.abs(codes.codes).max()
    for layer in tqdm(np.flatnonzero(spread > 1e-4).tolist(), desc="Drawing maps", disable=not progress):
        figures[f"map_layer_{layer + 1}.png"] = _maps(report, codes, subjects, layer)
    for name, figure in figures.items():
        # Without the library's version in it, the same report gives the same file.
        figure.savefig(output / name, dpi=120, metadata={"Software": None})
    return list(figures)


def _figure(width: float, height: float, title: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def _about(report: dict[str, Any]) -> str:
    return f"{ATTENTION_NAMES[report['attention_type']]} on {report['task']['name']}, {report['split']}"


def _probes(report: dict[str, Any]):
    """For each subject, its main metric by layer, with the shuffled control, chance, and the probe of the answer alone."""
    names = list(dict.fromkeys(result["subject"] for result in report["probes"]))
    figure = _figure(_WIDTH, 3.4, f"What linear probes read from the codes: {_about(report)}")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        results = [result for result in report["probes"] if result["subject"] == name]
        metric = {"classes": "accuracy", "labels": "f1", "number": "r2"}[results[0]["kind"]]
        places = np.arange(len(results))
        for kind, label, shift, colour, marker in (
            ("scores", "probe", -0.08, _COLOURS[0], "o"),
            ("control", "shuffled labels", 0.08, _COLOURS[1], "s"),
        ):
            values, errors = (
                [result[kind][metric][entry] for result in results] for entry in ("value", "standard_error")
            )
            axes.errorbar(places + shift, values, yerr=errors, fmt=marker, color=colour, capsize=3, label=label)
        axes.plot(
            places, [result["chance"][metric] for result in results], "_", color="black", markersize=22, label="chance"
        )
        if alone := report["answer_alone"].get(name):
            axes.axhline(alone[metric]["value"], color=_COLOURS[2], linestyle="--", label="from the answer alone")
        layers = ["all" if result["layer"] is None else str(result["layer"] + 1) for result in results]
        axes.set(title=f"{name}: {_METRICS[metric]}", xlabel="layer", xlim=(-0.5, len(results) - 0.5))
        axes.set_xticks(places, layers)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0), max(high, 1))
        axes.grid(axis="y", alpha=0.3)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return figure


def _similarity(report: dict[str, Any]):
    """
    The cosine similarity of the mean codes of the first subject with classes, with the mean of all codes removed. Layers in which
    the classes do not differ are left out, unless that would leave out all.
    """
    name, similarity = next(iter(report["similarity"].items()))
    names, every = similarity["names"], range(len(similarity["centred"]))
    layers = [layer for layer in every if np.any(similarity["centred"][layer])] or list(every)
    columns = min(len(layers), 2)
    rows = -(-len(layers) // columns)
    title = f"Cosine similarity of the mean codes by {name}, the mean of all removed\n{_about(report)}"
    figure = _figure(_WIDTH, 1.6 + 3.2 * rows + 0.08 * max(map(len, names)), title)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(layers) :]:
        axes.remove()
    for axes, layer in zip(grid.flat, layers, strict=False):
        matrix = np.array(similarity["centred"][layer])
        # The scale is that of a cosine, whatever was measured.
        image = axes.imshow(matrix, cmap="PuOr", vmin=-1, vmax=1)
        _write(axes, matrix, np.abs(matrix) > 0.7, size=min(8, 76 / len(names)))
        lowest = layer in layers[-columns:]
        axes.set_title(f"layer {layer + 1}")
        axes.set_xticks(range(len(names)), names if lowest else [], rotation=90, fontsize=9)
        axes.set_yticks(range(len(names)), names if axes in grid[:, 0] else [], fontsize=9)
    figure.colorbar(image, ax=figure.axes, shrink=0.5, label="cosine")
    return figure


def _ablation(report: dict[str, Any]):
    """What the score loses when a head's code is replaced by its mean, in bold where that is more than chance."""
    ablation = report["ablation"]
    difference, p_value = np.array(ablation["without"]) - ablation["whole"], np.array(ablation["p_value"])
    layers, heads = difference.shape
    figure = _figure(
        _WIDTH,
        2.2 + 0.45 * layers,
        f"{ablation['metric']} on {report['split']} without what one head says, minus {ablation['whole']:.3f} with all heads\n"
        f"{ATTENTION_NAMES[report['attention_type']]}; bold: p < 0.05 after Holm's correction for {difference.size} heads",
    )
    axes = figure.subplots()
    largest = np.abs(difference).max()
    image = axes.imshow(difference, cmap="PuOr", vmin=-largest, vmax=largest, aspect="auto")
    _write(axes, difference, np.abs(difference) > 0.7 * largest, p_value < 0.05, digits=3)
    axes.set(xlabel="head", ylabel="layer")
    axes.set_xticks(range(heads), range(1, heads + 1))
    axes.set_yticks(range(layers), range(1, layers + 1))
    figure.colorbar(image, ax=axes, label=f"difference of {ablation['metric']}")
    return figure


def _write(
    axes, matrix: np.ndarray, dark: np.ndarray, bold: np.ndarray | None = None, digits: int = 2, size: float = 8
):
    for (row, column), value in np.ndenumerate(matrix):
        colour = "white" if dark[row, column] else "black"
        weight = "bold" if bold is not None and bold[row, column] else "normal"
        # Without the zero before the point, since cells have no room for it.
        text = re.sub(r"^(-?)0\.", r"\1.", f"{round(value, digits) + 0.0:.{digits}f}").replace("-", "−")
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour, fontweight=weight)


def _maps(report: dict[str, Any], codes: Codes, subjects: list[Subject], layer: int):
    """t-SNE and PCA of a layer's codes, with a column for each colouring."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import StandardScaler

    features = codes.features(layer)
    chosen = np.random.default_rng(report["seed"]).permutation(len(features))[:_POINTS]
    features = StandardScaler().fit_transform(features[chosen])
    pca = PCA(2, random_state=report["seed"])
    tsne = TSNE(2, init="random", perplexity=min(30, (len(chosen) - 1) / 3), random_state=report["seed"])
    points = {"t-SNE": tsne.fit_transform(features), "PCA": pca.fit_transform(features)}
    colourings = [one for subject in subjects for one in _colourings(report, subject, layer, chosen)]
    title = f"Codes of the answer tokens in layer {layer + 1}: {_about(report)}"
    figure = _figure(_WIDTH, 2 * _WIDTH / len(colourings) + 0.8, title)
    grid = figure.subplots(2, len(colourings), squeeze=False)
    for row, (method, places) in zip(grid, points.items(), strict=True):
        for axes, (name, values, names) in zip(row, colourings, strict=True):
            drawn = _scatter(axes, places, values, names)
            axes.set(title=f"{method}, by {name}", xticks=[], yticks=[])
            if drawn is not None:
                figure.colorbar(drawn, ax=axes, shrink=0.8)
            elif method == "PCA":
                axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2, fontsize=8, markerscale=2)
    return figure


def _colourings(report: dict[str, Any], subject: Subject, layer: int, chosen: np.ndarray):
    """For each colouring its title, the values of the chosen rows, and the names of their classes (empty for numbers)."""
    values = subject.values[chosen]
    if subject.kind == "labels":
        result = next(r for r in report["probes"] if (r["subject"], r["layer"]) == (subject.name, layer))
        best = sorted(result["f1_by_class"], key=result["f1_by_class"].get, reverse=True)[:_SHOWN_LABELS]
        return [
            (f"{subject.name} {name}", values[:, subject.names.index(name)].astype(int), ("absent", "present"))
            for name in best
        ]
    # The values of a cell are numbers, although probes treat them as classes. Rules are not numbers.
    ordered = subject.kind == "number" or all(name.isdecimal() for name in subject.names)
    return [(subject.name, values, () if ordered or len(subject.names) > len(_COLOURS) else subject.names)]


def _scatter(axes, places: np.ndarray, values: np.ndarray, names: tuple[str, ...]):
    if not names:
        return axes.scatter(*places.T, c=values, cmap=_SHADES, s=5)
    absent = names == ("absent", "present")
    for index, name in enumerate(names):
        colour = ("#BBBBBB", _COLOURS[1])[index] if absent else _COLOURS[index]
        of_class = places[values == index]
        axes.scatter(*of_class.T, color=colour, marker=_MARKERS[index], s=9, linewidths=0, label=name)
    return None
