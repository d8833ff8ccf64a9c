"""
Fine-tunes a SRAVEN model on puzzles of five features, compares, and lists what publishing it would send:

    python recipes/sraven/finetune.py MODEL OUTPUT ORG/NAME [section.key=value ...]

MODEL is a repository's id or the folder of a run, OUTPUT the folder of the new run, ORG/NAME where it would be published.
The rest are changes of the recipe, such as trainer.max_steps=2000.
"""

import sys
from pathlib import Path

from hf_hyla.hub.publish import plan
from hf_hyla.training import evaluate, load_recipe, train
from hf_hyla.training.weights import initial_model


model, output, repo_id, *changes = sys.argv[1:]
settings = {
    "model.model_name_or_path": model,
    "task.num_features": "5",
    "trainer.max_steps": "10000",
    "trainer.warmup_steps": "500",
    "trainer.learning_rate": "3.0e-4",
    "trainer.eval_steps": "1000",
    "trainer.save_steps": "1000",
}
recipe = load_recipe("recipes/sraven/hyla.yaml", settings | dict(change.split("=", 1) for change in changes))

# The weights have the same shape for any number of features, so the model can be asked before it is trained on five.
before = {split: evaluate(initial_model(recipe), recipe.task, split) for split in ("test", "ood")}
record = train(recipe, Path(output))

print(f"\n{'split':<8}{'metric':<20}{'before':>10}{'after':>10}")
for split, scores in before.items():
    for name in recipe.task.metric_names:
        print(f"{split:<8}{name:<20}{scores[name]:>10.4f}{record.metrics[split][name]:>10.4f}")

if Path(model).exists():
    print(f"\nA run that starts from a folder cannot be published: publish {model} first, and name its repository.")
else:
    print(f"\n`hyla publish {output} --repo-id {repo_id}` would send:")
    for repository in plan(output, repo_id):
        print(repository.listing())
