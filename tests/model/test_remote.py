"""A repository of the Hub: loaded by its id without this package, trained, saved and resumed there; and with it."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from model_helpers import ids, make
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from hf_hyla import HylaConfig, HylaForCausalLM, HylaForSequenceClassification, HylaModel, SymbolicReasoningPipeline


COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = {
    "attention_hyla.py", "configuration_hyla.py", "inputs_hyla.py", "layers_hyla.py", "losses_hyla.py", "modeling_hyla.py",
    "pipeline_hyla.py",
}  # fmt: skip
# Imports once, and runs every script in a copy of itself.
INTERPRETER = """
import sys
sys.modules["hf_hyla"] = None  # any import of the package fails
import json, os, torch, traceback
from pathlib import Path
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import Trainer, TrainingArguments, pipeline, set_seed
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        sys.stdin = open(0, closefd=False)
        code = 1
        try:
            home, repository, script = json.loads(line)
            home = Path(home)
            exec(script)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Interpreter:
    """A process that cannot import the package and has nothing but a cache in the layout of huggingface_hub."""

    def __init__(self, home: Path):
        self.cache, self._errors = home / "hub", home / "errors.txt"
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))
        }
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", INTERPRETER],
                cwd=home,
                env={**environment, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def run(self, home: Path, repository: str, script: str) -> None:
        print(json.dumps([str(home), repository, textwrap.dedent(script)]), file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == "0\n", self._errors.read_text()[-3000:]

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    running = Interpreter(tmp_path_factory.mktemp("home"))
    yield running
    running.close()


class Repository:
    """A saved model in the layout in which huggingface_hub keeps what it has downloaded."""

    def __init__(self, home: Path, name: str, interpreter: Interpreter):
        self.home, self.name, self.cache = home, f"somebody/{name}", interpreter.cache
        self.snapshot = self.cache / f"models--somebody--{name}" / "snapshots" / COMMIT
        self.model = make(value_depth=2, ffn_type="moe", pad_token_id=7, attention_dropout=0.1)
        self.model.save_pretrained(self.snapshot)
        reference = self.snapshot.parents[1] / "refs" / "main"
        reference.parent.mkdir()
        reference.write_text(COMMIT)
        self._interpreter = interpreter

    def run(self, script: str) -> None:
        """Runs a script that knows a folder to write to, `home`, and the id of the repository, `repository`."""
        self._interpreter.run(self.home, self.name, script)


@pytest.fixture
def repository(tmp_path, interpreter):
    return Repository(tmp_path, tmp_path.name, interpreter)


def test_a_repository_loads_by_its_id_without_the_package_and_saves_itself_completely(repository):
    x, mask = ids(), torch.ones(3, 10, dtype=torch.long)
    mask[0, :4] = 0
    out = repository.model(x, attention_mask=mask, output_hidden_states=True)
    torch.save((x, mask, out.logits.detach(), out.hidden_states[-1].detach()), repository.home / "expected.pt")
    repository.run("""
        x, mask, logits, states = torch.load(home / "expected.pt")
        for auto in (AutoConfig, AutoModel, AutoModelForSequenceClassification):
            try:
                auto.from_pretrained(repository, trust_remote_code=False)
            except ValueError as error:
                assert "trust_remote_code=True" in str(error) and "custom code" in str(error), error
            else:
                raise AssertionError(f"{auto.__name__} ran a repository's code without leave")
            try:
                auto.from_pretrained(repository)  # nobody is there to be asked
            except ValueError as error:
                assert "trust_remote_code=True" in str(error), error
            else:
                raise AssertionError(f"{auto.__name__} ran a repository's code without asking")
        name = repository.partition("/")[2]
        code = lambda: [path for path in Path(os.environ["HF_HOME"], "modules").rglob("*_hyla.py") if name in path.parts]
        assert not code()

        config = AutoConfig.from_pretrained(repository, trust_remote_code=True)
        assert type(config).__name__ == "HylaConfig" and "transformers_modules" in type(config).__module__
        for source in (repository, home / "again", home / "again base"):
            base = AutoModel.from_pretrained(source, trust_remote_code=True).eval()
            assert code()
            model = AutoModelForSequenceClassification.from_pretrained(source, trust_remote_code=True).eval()
            for loaded in (base, model):
                assert "transformers_modules" in type(loaded).__module__, type(loaded)
            assert torch.equal(base(x, attention_mask=mask).last_hidden_state, states)
            if source != home / "again base":  # which has no head
                assert torch.equal(model(x, attention_mask=mask).logits, logits)
            if source == repository:
                model.save_pretrained(home / "again")
                base.save_pretrained(home / "again base")
    """)
    for folder in ("again", "again base"):
        first, again = ({p.name: p for p in f.iterdir()} for f in (repository.snapshot, repository.home / folder))
        assert set(first) == set(again) and set(first) > CODE
        assert all(first[name].read_bytes() == again[name].read_bytes() for name in CODE)
        # What is saved stands for itself, and does not send its reader back to where it came from.
        first, again = (json.loads(files["config.json"].read_text()) for files in (first, again))
        assert first["auto_map"] == again["auto_map"] and first["custom_pipelines"] == again["custom_pipelines"]


def test_a_language_model_generates_by_the_repositorys_id_without_the_package(repository):
    config = HylaConfig(
        vocab_size=19,
        answer_token_id=None,
        position_type="rotary",
        hidden_size=24,
        num_hidden_layers=2,
        is_causal=True,
    )
    model = HylaForCausalLM(config).eval()
    model.save_pretrained(repository.snapshot)
    generated = model.generate(ids(), max_new_tokens=5, do_sample=False)
    torch.save((ids(), generated, model(ids()).logits.detach()), repository.home / "expected.pt")
    repository.run("""
        x, generated, logits = torch.load(home / "expected.pt")
        for source in (repository, home / "again"):
            model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
            assert "transformers_modules" in type(model).__module__, type(model)
            assert torch.equal(model(x).logits, logits)
            assert torch.equal(model.generate(x, max_new_tokens=5, do_sample=False), generated)
            model.save_pretrained(home / "again")
            # As a script that trains from scratch builds it.
            config = AutoConfig.from_pretrained(source, trust_remote_code=True)
            fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
            assert fresh.lm_head.weight is fresh.model.embed_tokens.weight and fresh(x, labels=x).loss < 20
    """)
    assert {p.name for p in repository.snapshot.iterdir()} == {p.name for p in (repository.home / "again").iterdir()}


def test_the_pipeline_runs_by_the_repositorys_id_without_the_package(repository):
    puzzle = [[[0, 1, 2, 3], [1, 1, 1, 1], [2, 0, 4, 6]]] * 2 + [[[0, 1, 2, 3], [1, 1, 1, 1], None]]
    model = make(vocab_size=9, answer_token_id=8, num_labels=8)
    model.save_pretrained(repository.snapshot)
    solve = SymbolicReasoningPipeline(model=model, task="symbolic-reasoning", device="cpu")
    (repository.home / "expected.json").write_text(json.dumps([puzzle, solve(puzzle)]))
    repository.run("""
        puzzle, expected = json.loads((home / "expected.json").read_text())
        try:
            pipeline("symbolic-reasoning", model=repository, trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise AssertionError("the repository's code ran without leave")
        solve = pipeline("symbolic-reasoning", model=repository, trust_remote_code=True)
        assert "transformers_modules" in type(solve).__module__ and type(solve).__module__.endswith("pipeline_hyla")
        assert solve(puzzle) == expected and solve([puzzle] * 3, batch_size=2) == [expected] * 3
        solve.model.config.to_json_string(use_diff=False)
        for save in (solve.save_pretrained, solve.model.save_pretrained):
            save(home / "again")
            again = pipeline(model=str(home / "again"), trust_remote_code=True)
            assert type(again).__name__ == "SymbolicReasoningPipeline" and again(puzzle) == expected
    """)


def test_a_model_loaded_by_its_id_trains_and_resumes_without_the_package(repository):
    repository.run("""
        draw = torch.Generator().manual_seed(0)
        samples = [{"input_ids": torch.randint(0, 7, (10,), generator=draw),
                    "labels": torch.randint(0, 8, (4,), generator=draw)} for _ in range(32)]

        def train(folder, max_steps, resume=None):
            set_seed(0)
            model = AutoModelForSequenceClassification.from_pretrained(repository, trust_remote_code=True)
            args = TrainingArguments(
                output_dir=str(home / folder), max_steps=max_steps, save_steps=2, per_device_train_batch_size=4,
                gradient_accumulation_steps=2, learning_rate=1e-2, lr_scheduler_type="constant", report_to="none",
                disable_tqdm=True, use_cpu=True,
            )
            trainer = Trainer(model=model, args=args, train_dataset=samples)
            trainer.train(resume_from_checkpoint=resume)
            assert trainer.state.global_step == max_steps
            return {name: p.detach() for name, p in model.named_parameters()}

        two = train("run", 2)
        checkpoint = home / "run" / "checkpoint-2"
        four = train("run", 4, resume=str(checkpoint))
        at_once = train("at once", 4)
        for name, parameter in four.items():
            assert torch.equal(parameter, at_once[name]), name
        assert any(not torch.equal(parameter, two[name]) for name, parameter in four.items())
        saved = AutoModelForSequenceClassification.from_pretrained(checkpoint, trust_remote_code=True)
        for name, parameter in saved.named_parameters():
            assert torch.equal(parameter, two[name]), name
    """)
    for folder in ("run/checkpoint-2", "run/checkpoint-4"):
        saved = {p.name for p in (repository.home / folder).iterdir()}
        assert saved > {p.name for p in repository.snapshot.iterdir()} >= CODE


@pytest.mark.parametrize("trust", [None, False, True])
def test_with_the_package_installed_no_code_of_the_repository_runs(repository, monkeypatch, trust):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    for name in CODE:
        (repository.snapshot / name).write_text("raise SystemExit('the code of the repository runs')\n")
    where = {"cache_dir": repository.cache, "trust_remote_code": trust}
    assert type(AutoConfig.from_pretrained(repository.name, **where)) is HylaConfig
    base = AutoModel.from_pretrained(repository.name, **where)
    model = AutoModelForSequenceClassification.from_pretrained(repository.name, **where)
    assert type(base) is HylaModel and type(model) is HylaForSequenceClassification
    assert torch.equal(model(ids()).logits, repository.model(ids()).logits)
    assert torch.equal(base(ids()).last_hidden_state, repository.model.model(ids()).last_hidden_state)
