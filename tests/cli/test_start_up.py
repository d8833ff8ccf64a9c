"""What can be answered without torch is answered at once, and the classes are registered all the same."""

import os
import subprocess
import sys

import pytest

from hf_hyla.cli import COMMANDS


HERE = {**os.environ, "OMP_NUM_THREADS": "1"}


def processor_seconds(*words: str, code: int = 0) -> tuple[float, str]:
    """User and system time of a Python process, and what it printed."""
    script = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run([sys.executable, *sys.argv[1:]], capture_output=True, text=True)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime, done.returncode, done.stdout + done.stderr, sep='\\n')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=120, env=HERE, check=True
    )
    seconds, returned, printed = result.stdout.split("\n", 2)
    assert int(returned) == code, printed
    return float(seconds), printed


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 0, "usage: hyla"),
        (["--help"], 0, "usage: hyla"),
        (["--version"], 0, "hyla 0."),
        *(([command.__name__.rpartition(".")[2], "--help"], 0, "usage: hyla") for command in COMMANDS),
        (["trian"], 2, "did you mean train?"),
        (["train"], 2, "required: recipe"),
        (["train", "nosuch.yaml"], 2, "There is no recipe nosuch.yaml"),
        (["train", "logic/demo", "--lerning_rate", "1"], 2, "did you mean --trainer.learning_rate?"),
        (["train", "logic/demo", "--trainer.lerning_rate", "1"], 2, "did you mean --trainer.learning_rate?"),
        (["train", "logic/demo", "--max-minutes", "-1"], 2, "--max-minutes must be larger than 0"),
        (["evaluate", "nosuch"], 2, "There is no run or model nosuch"),
        (["evaluate", "nosuch", "--batch-size", "0"], 2, "--batch-size must be an integer of at least 1, got 0"),
        (["evaluate", "nosuch", "--task", "ravens"], 2, "did you mean sraven?"),
        (["probe", "nosuch", "--task.seed"], 2, "lacks a value"),
        (["compare", "nosuch"], 2, "There is no run nosuch"),
        (["sweep", "nosuch"], 2, "There is no recipe nosuch"),
        (["bench", "--task", "nosuch"], 2, "--task must be one of"),
        (["card", "nosuch"], 2, "There is no run nosuch"),
        (["publish", "nosuch", "--repo-id", "a/b"], 2, "There is no run nosuch"),
        (["convert", "--params", "a", "--config", "b", "--output", "c"], 2, "There is no file of parameters a"),
        (["recipes"], 0, "logic/demo.yaml"),
        (["recipes", "nosuch"], 2, "There is no recipe nosuch"),
    ],
)
def test_help_and_wrong_arguments_take_under_half_a_second_of_processor_time(words, code, message):
    seconds, printed = processor_seconds("-m", "hf_hyla", *words, code=code)
    assert message in printed and seconds < 0.5


def test_help_loads_neither_torch_nor_transformers():
    script = (
        "import sys, contextlib; from hf_hyla.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['train', '--help'])\n"
        "main(['train', 'nosuch'])\n"
        "assert not {'torch', 'transformers', 'datasets', 'accelerate'} & sys.modules.keys()"
    )
    processor_seconds("-c", script)


def test_the_classes_take_little_more_to_load_than_bert():
    ours, berts = [], []
    for _ in range(4):  # other work on the machine slows single ones down
        ours.append(processor_seconds("-c", "from hf_hyla import HylaForSequenceClassification")[0])
        berts.append(processor_seconds("-c", "from transformers import BertForSequenceClassification")[0])
        if min(ours) <= 1.15 * min(berts):
            break
    assert min(ours) <= 1.15 * min(berts)
    assert processor_seconds("-c", "import hf_hyla")[0] < 0.5


USED = """
import pickle
from transformers import AutoConfig, AutoModelForSequenceClassification, pipeline
config = AutoConfig.for_model("hyla", num_hidden_layers=1)
model = AutoModelForSequenceClassification.from_config(config)
assert type(pickle.loads(pickle.dumps(model))) is type(model)
assert type(pipeline("symbolic-reasoning", model=model)).__name__ == "SymbolicReasoningPipeline"
print(type(model).__module__)
"""


@pytest.mark.parametrize(
    "before",
    [
        "import hf_hyla",
        "from transformers import AutoModel; import hf_hyla",
        "from hf_hyla import *",
        "import hf_hyla.model.configuration_hyla",
        "import importlib.util, hf_hyla; assert importlib.util.find_spec('transformers')",
        "import hf_hyla.cli; hf_hyla.cli.main(['--foo'])",
    ],
)
def test_the_classes_are_registered_in_every_order_of_imports(before):
    assert "hf_hyla.model.modeling_hyla" in processor_seconds("-c", before + USED)[1]


def test_a_pickled_config_loads_where_nothing_has_been_imported(tmp_path):
    path = tmp_path / "config.pkl"
    processor_seconds("-c", f"import pickle, hf_hyla; pickle.dump(hf_hyla.HylaConfig(), open({str(path)!r}, 'wb'))")
    load = f"import pickle; config = pickle.load(open({str(path)!r}, 'rb'))"
    assert "hf_hyla.model.modeling_hyla" in processor_seconds("-c", load + USED)[1]


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    _, printed = processor_seconds("-c", "import hf_hyla; hf_hyla.HylaConfg", code=1)
    assert "AttributeError: module 'hf_hyla' has no attribute 'HylaConfg'" in printed


def test_threads_that_import_at_once_do_not_wait_for_each_other():
    script = """
import threading, hf_hyla
failed, together = [], threading.Barrier(3)
def run(imports):
    together.wait()
    try:
        exec(imports)
    except BaseException as error:
        failed.append(error)
imports = "from transformers import AutoModel", "from hf_hyla import HylaConfig", "import hf_hyla.model.modeling_hyla"
threads = [threading.Thread(target=run, args=(one,)) for one in imports]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failed, failed
"""
    assert "hf_hyla.model.modeling_hyla" in processor_seconds("-c", script + USED)[1]
