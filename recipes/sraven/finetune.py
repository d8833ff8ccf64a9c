"""
Fine-tunes a SRAVEN model on puzzles of five features, compares it with its start, and lists the files that publishing would send:

    python recipes/sraven/finetune.py MODEL OUTPUT [ORG/NAME] [section.key=value ...]

MODEL is a repository's id or the folder of a run. OUTPUT is the folder of the new run. ORG/NAME is the repository to publish it in,
and may be left out. The other arguments change the recipe, such as trainer.max_steps=2000.
"""

import sys
from pathlib import Path

from hf_hyla.hub.publish import check_publishable
from hf_hyla.hub.repository import plan
from hf_hyla.runs import Run
from hf_hyla.training import evaluate, load_recipe, train
from hf_hyla.training.weights import initial_model


SETTINGS = {
    "task.num_features": "5",
    "trainer.max_steps": "10000",
    "trainer.warmup_steps": "500",
    "trainer.learning_rate": "3.0e-4",
    "trainer.eval_steps": "1000",
    "trainer.save_steps": "1000",
}


def finetune(model: str, output: Path, repo_id: str | None, changes: dict[str, str]) -> None:
    recipe = load_recipe("recipes/sraven/hyla.yaml", {"model.model_name_or_path": model} | SETTINGS | changes)
    if repo_id:  # reasons against publishing are reported before the training
        check_publishable(recipe.settings, repo_id)
    record = train(recipe, output)

    # The weights have the same shape for any number of features, so the model could be asked before it was trained on five.
    start = initial_model(recipe.settings["model"], recipe.config, recipe.task.auto_class)
    before = {split: evaluate(start, recipe.task, split) for split in ("test", "ood")}
    print(f"\n{'split':<8}{'metric':<20}{'before':>10}{'after':>10}")
    for split, scores in before.items():
        for name in recipe.task.metric_names:
            print(f"{split:<8}{name:<20}{scores[name]:>10.4f}{record.metrics[split][name]:>10.4f}")

    if repo_id:
        print(f"\n`hyla publish {output} --repo-id {repo_id}` would send:")
        for repository in plan(Run.load(output), repo_id):
            print(repository.listing())


if __name__ == "__main__":
    names = [word for word in sys.argv[1:] if "=" not in word]
    changes = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    if len(names) not in (2, 3):
        sys.exit("Usage: python recipes/sraven/finetune.py MODEL OUTPUT [ORG/NAME] [section.key=value ...]")
    try:
        finetune(names[0], Path(names[1]), names[2] if len(names) == 3 else None, changes)
    except (ValueError, OSError) as error:
        sys.exit(f"finetune.py: {' '.join(str(error).split())}")
