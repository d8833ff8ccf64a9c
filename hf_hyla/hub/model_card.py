"""A run's card: run.json → README.md, plots and evaluation results. It needs no network, and only `write_card` writes files."""

import dataclasses
import functools
import operator
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import validate_repo_id

from ..model import HylaConfig
from ..reading import read_json
from ..runs import Run, RunRecord, plots
from ..runs.compare import check_seeds, grouped
from ..runs.folder import CARD_NAME, COMPARISON_NAME, CURVE_NAME, EVAL_RESULTS, PROBE_NAME
from ..runs.paper import config_of, effective, paper_result
from ..runs.record import mean_and_error, without_seeds
from ..tasks import Task
from ..utils import ATTENTION_NAMES, as_literal, check_repo_id
from .cards import CITATION, LICENSE, as_code, as_text, dataset_repo, run_snippet, template
from .checks import check_base_model, check_unaltered


def card_files(run: Run, repo_id: str | None = None, others: Sequence[str | Path] = ()) -> dict[str, str | bytes]:
    """
    The card of a finished run, as files by name: README.md, its pictures, `.eval_results/`, and what `hyla probe` has found.

    Args:
        run: the run. Its model answers the question that the card shows. `probe/` in its folder is what `hyla probe` wrote.
        repo_id: `ORG/NAME` of the card's repository; without it, the card's snippet loads the model from the run's folder.
        others: records (folders of runs, or JSON files) of the same recipe with other seeds, for the spread, and of other recipes
            for the same task, such as those of another attention, for the comparison. The run's own record may be among them.

    Raises:
        ValueError: if `others` are runs of something else, or `probe/` is about other weights.
        OSError: if something is missing.
    """
    seeds, baselines = _sorted_out(run, [RunRecord.load(path) for path in others])
    if repo_id is not None:
        check_repo_id(repo_id)
    if run.base_repository:
        check_base_model(run.record.recipe["model"], str(run.folder))
    check_unaltered(run)

    probe = _probe_of(run)
    render = functools.partial(_render, run, repo_id, seeds=seeds, baselines=baselines, probe=probe)
    text = render(printed=run_snippet(render(), {as_literal(repo_id or str(run.folder)): repr(str(run.folder))}))
    check_card(text)
    files: dict[str, str | bytes] = {
        CARD_NAME: text,
        COMPARISON_NAME: plots.over_samples([seeds, *baselines]),
        CURVE_NAME: plots.learning_curve(run.record, run.config.attention_dropout > 0),
    }
    if dataset := dataset_repo(run.task, repo_id):
        files[f"{EVAL_RESULTS}/{run.task.name}.yaml"] = _eval_results(run, dataset)
    if probe:
        folder = Path(PROBE_NAME).parent
        found = [PROBE_NAME, *(str(folder / name) for name in probe["figures"])]
        files |= {name: (run.folder / name).read_bytes() for name in found}
    return files


def write_card(
    run: str | Path, output: str | Path, repo_id: str | None = None, others: Sequence[str | Path] = ()
) -> list[Path]:
    """Writes the files of `card_files` for the finished run in the folder `run` into `output`, and returns their paths."""
    written = []
    for name, content in card_files(Run.load(run), repo_id, others).items():
        path = Path(output) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        written.append(path)
    return written


def check_card_before_training(name: str, settings: dict[str, Any], task: Task, config: HylaConfig) -> None:
    """
    Renders and checks the card of a run that has not been trained, with zeros for results. So a wrong field is found before
    hours of training.

    Raises:
        ValueError: if the card would not be valid.
    """
    scored = {split: dict.fromkeys(task.metric_names, 0.0) for split in task.splits if split != "train"}
    record = RunRecord(
        name=name,
        recipe=settings,
        seeds={"task": task.seed, "trainer": 0},
        num_parameters=0,
        steps=1,
        samples_seen=1,
        seconds=0.0,
        metrics={split: scores | {"num_samples": 1} for split, scores in scored.items()},
        curve=[],
        environment={},
        hardware={},
    )
    run = Run(Path(name), record)
    run.task, run.config = task, config  # there is no folder yet to read them from
    check_card(_render(run, settings["trainer"].get("hub_model_id"), seeds=[record], baselines=[]))


def _sorted_out(run: Run, others: list[RunRecord]) -> tuple[list[RunRecord], list[list[RunRecord]]]:
    """
    The runs of this run's recipe, beginning with the run itself, and the runs of each other recipe for the same task.

    Raises:
        ValueError: for a record that is neither or lacks scores, or two runs of a recipe with the same seeds.
    """
    record, of_others = run.record, []
    seeds = [record]
    for other in others:
        if without_seeds(other.recipe) == without_seeds(record.recipe):
            # A copy of a run does not count as another seed.
            seeds += [other] if other.identity not in {one.identity for one in seeds} else []
        elif plots.task_settings(other) == plots.task_settings(record) and plots.attention_of(other):
            of_others.append(other)
        else:
            raise ValueError(
                f"{other.name} (seeds {other.seeds}) cannot be compared with this run: expected runs that differ in nothing but "
                "their seeds, or runs for the same task that did not start from other weights."
            )
        if any(run.task.metric_names[0] not in other.metrics.get(split, {}) for split in record.metrics):
            raise ValueError(
                f"{other.name} (seeds {other.seeds}) lacks scores of the splits {', '.join(record.metrics)}: train that run again."
            )
    check_seeds(seeds)
    return seeds, grouped(of_others)


def _probe_of(run: Run) -> dict[str, Any] | None:
    """
    The report of `hyla probe` in a run's folder, with what the card shows of it; `None` without a report.

    Raises:
        ValueError: if it is not a report, or is about weights other than the run's.
        OSError: if a figure of it is missing.
    """
    path = run.folder / PROBE_NAME
    if not path.exists():
        return None
    again = f"call `hyla probe {run.folder}` again."
    try:
        report = read_json(path)
        weights, figures = report["weights"], report["figures"]
        shown = {
            "table": _probe_table(report),
            "numbers": ", ".join(
                dict.fromkeys(as_code(p["subject"]) for p in report["probes"] if p["kind"] == "number")
            ),
            "layers": len(range(report["codes"]["layers"])[: run.config.num_hidden_layers]),
            "fitted_on": operator.index(report["num_samples"]["train"]),
            "scored_on": operator.index(report["num_samples"][report["split"]]),
            "ablation": _ablation_of(report),
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a report of a probe ({type(error).__name__}: {error}): {again}") from None
    if weights != run.weights_digest:
        raise ValueError(f"{path} is about other weights than those of {run.folder}: {again}")
    if not figures:
        raise ValueError(f"{path} has no figures, since drawing them was not finished: {again}")
    for name in figures:
        # Figures lie beside the report. Any other path could publish a file from elsewhere.
        if not (isinstance(name, str) and re.fullmatch(r"\w+\.png", name)):
            raise ValueError(f"{path} names the figure {name!r}, expected a plain name that ends with .png: {again}")
    last_map = next((name for name in reversed(figures) if name.startswith("map_layer_")), None)
    return report | shown | {"last_map": last_map}


def _ablation_of(probe: dict[str, Any]) -> dict[str, Any] | None:
    ablation = probe.get("ablation")
    return ablation and {"metric": str(ablation["metric"]), "whole": float(ablation["whole"])}


def _probe_table(probe: dict[str, Any]) -> list[list[str]]:
    """
    The rows of a table: what is asked for, the metric, and the scores of each layer, of all layers, of the control and of the
    answer alone. For classes that can be true together accuracy is left out, since a probe that always says no has a high one.
    """

    def cell(score: dict[str, float], chance: float) -> str:
        return f"{score['value']:.3f} ± {score['standard_error']:.3f} ({chance:.3f})"

    rows = []
    for subject in dict.fromkeys(result["subject"] for result in probe["probes"]):
        results = [result for result in probe["probes"] if result["subject"] == subject]
        alone = probe["answer_alone"].get(subject)
        for metric in ["f1"] if results[0]["kind"] == "labels" else results[0]["scores"]:
            cells = [cell(result["scores"][metric], result["chance"][metric]) for result in results]
            last = results[-1]
            cells.append(cell(last["control"][metric], last["chance"][metric]))
            cells.append("{value:.3f} ± {standard_error:.3f}".format(**alone[metric]) if alone else "–")
            rows.append([as_text(subject), as_text(metric), *cells])
    return rows


def check_card(text: str) -> None:
    """
    Raises:
        ValueError: if the card's metadata cannot be read back as what the Hub expects.
    """
    data = ModelCard(text).data
    for field in ("license", "library_name", "tags", "metrics", "eval_results"):
        if not data.get(field):
            raise ValueError(f"The card's metadata lack {field}: it needs the task's name and its metrics.")
    for dataset in data.get("datasets") or []:
        validate_repo_id(dataset)


def _render(
    run: Run,
    repo_id: str | None,
    *,
    seeds: list[RunRecord],
    baselines: list[list[RunRecord]],
    probe: dict[str, Any] | None = None,
    printed: str = "",
) -> str:
    """The card. `printed` is what its example prints, which is known only when the example of a first card has been run."""
    record, task, config, base_model = run.record, run.task, run.config, run.base_model
    title = " ".join((repo_id.partition("/")[2] if repo_id else record.name).split())
    words = task.words(task)
    dataset = dataset_repo(task, repo_id)
    data = ModelCardData(
        license=LICENSE,
        library_name="transformers",
        pipeline_tag=words.pipeline_tag,
        tags=["hyla", f"{config.attention_type}-attention", *words.tags, task.name],
        datasets=[dataset] if dataset else None,
        metrics=list(task.metric_names),
        # The Hub would take a folder for a repository.
        base_model=run.base_repository,
        model_name=title,
        eval_results=_model_index(run, repo_id),
    )
    return str(
        ModelCard.from_template(
            data,
            template_str=template("model_card.md"),
            title=as_text(title),
            model_id=repo_id or str(run.folder),
            record=record,
            task=task,
            words=words,
            compositional="ood" in task.splits,
            config=config,
            paper=run.paper,
            base_model=base_model,
            full_budget=task.num_samples["train"],
            share=run.budget_share,
            percent=_percent,
            shown=as_text,
            code=as_code,
            attention=ATTENTION_NAMES[config.attention_type],
            seeds=seeds,
            baselines=baselines,
            several=any(len(group) > 1 for group in (seeds, *baselines)),
            comparison=_comparison(run, seeds, baselines),
            differing=_differing_from_baselines(run, seeds, baselines),
            probe=probe,
            printed=printed,
            command=_command(record),
            not_default=_not_default(task, config),
            environment={**record.environment, **record.hardware},
            citation=CITATION,
        )
    )


def _percent(share: float) -> str:
    """A share as a percentage with three digits. A share below 1 is never shown as 100 %."""
    return f"{min(100 * share, 99.9) if share < 1 else 100 * share:.3g} %"


def _model_index(run: Run, repo_id: str | None) -> list[EvalResult]:
    """Every score, as the card's metadata hold it, with the digits of its tables."""
    task = run.task
    title = task.words(task).title
    return [
        EvalResult(
            task_type="other",
            task_name=title,
            dataset_type=dataset_repo(task, repo_id) or task.name,
            dataset_name=title,
            dataset_split=split,
            metric_type=name,
            metric_value=round(scores[name], 4),
        )
        for split, scores in run.record.metrics.items()
        for name in task.metric_names
        if name in scores
    ]


def _eval_results(run: Run, dataset: str) -> str:
    """The headline metric of every split, as .eval_results/ holds it: each split is a task of the dataset."""
    if run.base_model:
        budget = f"trained further on {run.record.samples_seen:,} samples"
    elif not run.task.paper:
        budget = f"{run.record.samples_seen:,} training samples"
    else:
        budget = f"{_percent(run.budget_share)} of the paper's training samples"
    metric = run.task.metric_names[0]
    entries = [
        EvalResultEntry(
            dataset_id=dataset,
            task_id=split,
            value=round(scores[metric], 4),
            notes=f"{metric}, one seed, {budget}",
        )
        for split, scores in run.record.metrics.items()
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)


def _not_default(task: Task, config: HylaConfig) -> list[tuple[str, Any, Any]]:
    """The settings of task and model that differ from the default: name, value, default."""
    defaults = {field.name: field.default for field in dataclasses.fields(task)}
    papers = HylaConfig(**task.model_defaults)
    of_task = [(f"task.{name}", value, defaults[name]) for name, value in task.settings.items()]
    # transformers' Trainer writes `use_cache` into the config of whatever it trains.
    fields = sorted(HylaConfig.__annotations__.keys() - {"use_cache"})
    of_model = [(f"model.{name}", getattr(config, name), getattr(papers, name)) for name in fields]
    return [(name, value, default) for name, value, default in of_task + of_model if value != default]


def _command(record: RunRecord) -> str:
    processes = record.hardware.get("num_processes", 1)
    # On a CPU, accelerate starts several processes only by such a configuration.
    config = f"recipes/accelerate/{'ddp' if record.hardware.get('accelerator') else 'ddp_cpu'}.yaml"
    launch = f"accelerate launch --config_file {config} --num_processes {processes} -m hf_hyla"
    launched = launch if processes > 1 else "hyla"
    stays = " --trainer.push_to_hub false" if record.recipe["trainer"].get("push_to_hub") else ""
    return f"{launched} train resolved_recipe.yaml --output run{stays}"


def _comparison(run: Run, seeds: list[RunRecord], baselines: list[list[RunRecord]]) -> list[list[str]]:
    """
    The rows of a table, for this run, for all runs of its recipe, and for each other recipe: name, number of runs, training
    samples, the headline score on each split, and the paper's on `ood`.
    """
    metric = run.task.metric_names[0]

    def row(name: str, group: list[RunRecord]) -> list[str]:
        cells = []
        for split in run.record.metrics:
            mean, error = mean_and_error([record.metrics[split][metric] for record in group])
            cells.append(f"{mean:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
        paper = paper_result(group[0].recipe)
        papers = [f"{paper.mean:.4f} ± {paper.standard_error:.4f}" if paper else "–"] if run.task.paper else []
        return [name, str(len(group)), f"{group[0].samples_seen:,}", *cells, *papers]

    name = ATTENTION_NAMES[run.config.attention_type]
    rows = [row(f"**{name}, this model**", seeds[:1])]
    if len(seeds) > 1:
        rows.append(row(f"{name}, all seeds", seeds))
    return rows + [row(as_text(label), group) for label, group in _named(seeds, baselines)]


def _named(seeds: list[RunRecord], baselines: list[list[RunRecord]]) -> Iterator[tuple[str, list[RunRecord]]]:
    """The other recipes with what the picture calls them."""
    return zip(plots.labels([seeds, *baselines])[1:], baselines, strict=True)


def _differing_from_baselines(run: Run, seeds: list[RunRecord], baselines: list[list[RunRecord]]) -> list[list[str]]:
    """
    The rows of a table of the settings besides the attention in which other recipes differ from a run: key, the run's value, and
    theirs with their names. A setting of the model that a recipe leaves out has its default.
    """
    ours = without_seeds(seeds[0].recipe)
    theirs = [
        (name, without_seeds(group[0].recipe), config_of(group[0].recipe)) for name, group in _named(seeds, baselines)
    ]

    def value(key: str, settings: dict[str, Any], config: HylaConfig) -> Any:
        section, _, name = key.partition(".")
        if section == "model" and name in HylaConfig.__annotations__:
            return effective(config, name)
        return settings.get(key)

    def shown(key: str, settings: dict[str, Any], config: HylaConfig) -> str:
        is_left_out = key not in settings and key.startswith("trainer.")
        return "default" if is_left_out else as_text(value(key, settings, config))

    rows = []
    for key in dict.fromkeys(key for settings in (ours, *(one for _, one, _ in theirs)) for key in settings):
        names: dict[str, list[str]] = {}
        for name, settings, config in theirs:
            if value(key, settings, config) != value(key, ours, run.config):
                names.setdefault(shown(key, settings, config), []).append(as_text(name))
        if names and key != "model.attention_type":
            others = ", ".join(f"{text} ({'; '.join(of)})" for text, of in names.items())
            rows.append([as_code(key), shown(key, ours, run.config), others])
    return rows
