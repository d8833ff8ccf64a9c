"""Tests of the start-up: commands that need no torch do not import it, and the classes are registered in any case."""

import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading

import pytest

from hf_hyla import HylaConfig
from hf_hyla.cli import COMMANDS


HERE = {**os.environ, "OMP_NUM_THREADS": "1"}


def processor_seconds(*words: str, code: int = 0) -> tuple[float, str]:
    """User and system time of a Python process, and what it printed."""
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen([sys.executable, *words], stdout=printed, stderr=printed, env=HERE)
        alarm = threading.Timer(240, process.kill)
        alarm.start()
        _, status, used = os.wait4(process.pid, 0)
        alarm.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        text = printed.read()
    assert process.returncode == code, text
    return used.ru_utime + used.ru_stime, text


# Words, exit code, and a part of what is printed.
ANSWERED_AT_ONCE = [
    ([], 0, "usage: hyla"),
    (["--help"], 0, "usage: hyla"),
    (["--version"], 0, "hyla 0."),
    *(([command.__name__.rpartition(".")[2], "--help"], 0, "usage: hyla") for command in COMMANDS),
    (["trian"], 2, "did you mean 'train'?"),
    (["train"], 2, "required: recipe"),
    (["train", "nosuch.yaml"], 2, "There is no recipe nosuch.yaml"),
    (["train", "logic/demo", "--lerning_rate", "1"], 2, "did you mean --trainer.learning_rate?"),
    (["train", "logic/demo", "--trainer.lerning_rate", "1"], 2, "did you mean --trainer.learning_rate?"),
    (["train", "logic/demo", "--trainer.max_steps", "0"], 2, "--trainer.max_steps must be at least 1, got 0"),
    (["train", "logic/demo", "--trainer.max_steps", "1.5"], 2, "--trainer.max_steps must be int, got 1.5"),
    (["train", "logic/demo", "--trainer.learning_rate", "fast"], 2, "--trainer.learning_rate must be float"),
    (["train", "logic/demo", "--trainer.optim", "moun"], 2, "did you mean 'muon'?"),
    (["train", "logic/demo", "--trainer.hub_token", "x"], 2, "--trainer.hub_token must never be stored in a file"),
    (["train", "logic/demo", "--model.attention_type", "hyper"], 2, "must be one of hyla, linear, softmax"),
    (["train", "logic/demo", "--task.held_out", "3"], 2, "--task.held_out must be less than 1, got 3"),
    (["train", "logic/demo", "--task.num_values", "3"], 2, "The task logic has no setting --task.num_values"),
    (["data", "sraven", "--output", "x", "--task.num_terms", "3"], 2, "did you mean 'num_features'?"),
    (["train", "logic/demo", "--max-minutes", "-1"], 2, "--max-minutes must be larger than 0"),
    (["evaluate", "nosuch"], 2, "There is no run or model nosuch"),
    (["evaluate", "nosuch", "--batch-size", "0"], 2, "--batch-size must be an integer of at least 1, got 0"),
    (["evaluate", "nosuch", "--task", "ravens"], 2, "did you mean 'sraven'?"),
    (["probe", "nosuch", "--task.seed"], 2, "lacks a value"),
    (["demo", "nosuch"], 2, "There is no run or model nosuch"),
    (["demo", "--port", "65536"], 2, "--port must be at most 65535, got 65536"),
    (["demo", "--port", "x"], 2, "--port must be an integer of at least 1, got x"),
    (["compare", "nosuch"], 2, "There is no run nosuch"),
    (["sweep", "nosuch"], 2, "There is no recipe nosuch"),
    (["bench", "--task", "nosuch"], 2, "--task must be one of"),
    (["bench", "--against", "nosuch"], 2, "must be a folder, or a commit of this checkout, got nosuch"),
    (["card", "nosuch"], 2, "There is no run nosuch"),
    (["publish", "nosuch", "--repo-id", "a/b"], 2, "There is no run nosuch"),
    (["convert", "--params", "a", "--config", "b", "--output", "c"], 2, "There is no file of parameters a"),
    (["recipes"], 0, "logic/demo.yaml"),
    (["recipes", "nosuch"], 2, "There is no recipe nosuch"),
]
# Answers each of them in a copy of a process that has imported the command line, and checks what got loaded.
ANSWERING = """
import contextlib, json, os, resource, sys
from hf_hyla.cli import main
slow = {'torch', 'transformers', 'datasets', 'accelerate'}
for words in json.loads(sys.argv[1]):
    read, write = os.pipe()
    if not os.fork():
        os.dup2(write, 1), os.dup2(write, 2)
        sys.stdout = os.fdopen(1, 'w')  # the copied one stands in a file, which a pipe is not
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code or 0
        sys.stdout.flush()
        if loaded := slow & sys.modules.keys():
            code = f"loads {', '.join(sorted(loaded))}"
        used = resource.getrusage(resource.RUSAGE_SELF)
        print("\\n" + json.dumps([code, used.ru_utime + used.ru_stime]), flush=True)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as printed:
        text, _, end = printed.read().rstrip().rpartition("\\n")
    os.wait()
    print(json.dumps([*json.loads(end), text]), flush=True)
"""


def test_help_and_wrong_arguments_are_answered_at_once_and_without_torch():
    starting, _ = processor_seconds("-c", "import hf_hyla.cli")
    asked = [words for words, _, _ in ANSWERED_AT_ONCE]
    _, printed = processor_seconds("-c", ANSWERING, json.dumps(asked))
    answers = [json.loads(line) for line in printed.splitlines()]
    for (words, code, message), (returned, seconds, text) in zip(ANSWERED_AT_ONCE, answers, strict=True):
        assert returned == code and message in text, (words, returned, text)
        assert starting + seconds < 0.5, words


@pytest.mark.parametrize(("words", "code"), [(["train", "--help"], 0), (["evaluate", "nosuch"], 2)])
def test_the_command_starts_in_under_half_a_second_of_processor_time(words, code):
    assert processor_seconds("-m", "hf_hyla", *words, code=code)[0] < 0.5


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
print(type(model).__module__, flush=True)
"""
# Runs each script in a copy of a process that has imported what takes long, as transformers will, and nothing of transformers.
IN_COPIES = """
import json, os, sys, traceback
import scipy.optimize, torch, torch._dynamo, torch.distributed.tensor
for script in json.loads(sys.argv[1]):
    if not os.fork():
        try:
            exec(script, {})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.wait()[1] == 0, script
"""


def test_the_classes_are_registered_in_every_order_of_imports_and_by_a_pickle(tmp_path):
    path = tmp_path / "config.pkl"
    path.write_bytes(pickle.dumps(HylaConfig()))
    orders = [
        "import hf_hyla",
        "from transformers import AutoModel; import hf_hyla",
        "from hf_hyla import *",
        "import hf_hyla.model.configuration_hyla",
        "import importlib.util, hf_hyla; assert importlib.util.find_spec('transformers')",
        "import hf_hyla.cli; hf_hyla.cli.main(['--foo'])",
        f"import pickle; config = pickle.load(open({str(path)!r}, 'rb'))",
    ]
    _, printed = processor_seconds("-c", IN_COPIES, json.dumps([order + USED for order in orders]))
    assert printed.count("hf_hyla.model.modeling_hyla") == len(orders)


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    _, printed = processor_seconds("-c", "import hf_hyla; hf_hyla.HylaConfg", code=1)
    assert "AttributeError: module 'hf_hyla' has no attribute 'HylaConfg'" in printed


def test_threads_that_import_at_the_same_time_do_not_deadlock():
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
# transformers replaces its own module while it is imported, so that another thread may not find its names, with this package
# or without it.
failed = [error for error in failed if "from 'transformers'" not in str(error)]
assert not failed, failed
import hf_hyla.model.modeling_hyla
"""
    assert "hf_hyla.model.modeling_hyla" in processor_seconds("-c", script + USED)[1]
