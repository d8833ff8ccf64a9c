"""Puzzles follow the rules that were chosen, answers are those of the model, and the verdict is that of the ideal observer."""

import dataclasses

import numpy as np
import pytest
import torch

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.demo import pages, puzzles
from hf_hyla.demo.puzzles import Solver, Verdict, edit, sample, seen, verdict, with_rules
from hf_hyla.demo.shown import Shown
from hf_hyla.runs import RunRecord
from hf_hyla.tasks import get_task
from hf_hyla.tasks.sraven import RULES
from hf_hyla.utils import models_folder


TASK = get_task("sraven")
SUM, CONSTANT, UP = RULES.index("sum"), RULES.index("constant"), RULES.index("progression +1")


@pytest.fixture(scope="module")
def solver() -> Solver:
    """A model of the task's shape with large random weights."""
    torch.manual_seed(0)
    config = HylaConfig(**TASK.model_defaults | {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32})
    model = HylaForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    record = RunRecord.load(models_folder() / "hyla-sraven")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(puzzles, "_PROBE_PUZZLES", 64)
        return Solver(Shown("mine", "HYLA", model, record), TASK)


def test_a_puzzle_is_the_sample_of_the_task():
    puzzle, drawn = sample(TASK, "ood", 7, shuffled=True), TASK.samples("ood", [7])
    assert [v for panel in puzzle.panels[:-1] for v in panel] == drawn["input_ids"][0, :-4].tolist()
    assert puzzle.panels[-1] == tuple(drawn["labels"][0])
    assert sorted(puzzle.rules) == drawn["rules"][0].tolist()
    assert not seen(TASK, puzzle.rules) and seen(TASK, sample(TASK, "test", 7, shuffled=True).rules)


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_chosen_rule_holds_in_every_row_and_leaves_the_other_features_alone(shuffled):
    before = sample(TASK, "ood", 3, shuffled)
    for feature in range(4):
        for rule in (SUM, CONSTANT, UP):
            rules = tuple(rule if i == feature else old for i, old in enumerate(before.rules))
            puzzle = with_rules(TASK, before, rules, shuffled)
            assert puzzle.rules == rules
            # The place of this feature in each column.
            asked = puzzle.permutations[-1][feature]
            places = [order.index(asked) for order in puzzle.permutations]
            for row in range(3):
                a, b, c = (puzzle.panels[3 * row + column][places[column]] for column in range(3))
                assert {SUM: c == (a + b) % 8, CONSTANT: a == b == c, UP: c - b in (1, -7) and b - a in (1, -7)}[rule]
            for number, panel in enumerate(puzzle.panels):
                others = [i for i in range(4) if i != places[number % 3]]
                assert [panel[i] for i in others] == [before.panels[number][i] for i in others]


def test_shuffling_keeps_the_rule_of_each_feature():
    straight = sample(TASK, "ood", 11, shuffled=False)
    assert straight.permutations == ((0, 1, 2, 3),) * 3
    shuffled = with_rules(TASK, straight, straight.rules, shuffled=True)
    assert shuffled.panels == sample(TASK, "ood", 11, shuffled=True).panels
    assert shuffled.panels != straight.panels
    assert with_rules(TASK, shuffled, shuffled.rules, shuffled=False).panels == straight.panels


@pytest.mark.parametrize("text", ["1 2 3 4", "1234", " 1, 2;3 4 ", "1 | 2 | 3 | 4"])
def test_a_panel_is_changed_by_its_digits(text):
    before = sample(TASK, "ood", 0, shuffled=False)
    after = edit(TASK, before, 4, text)
    assert after.panels[4] == (1, 2, 3, 4) and after.edited
    assert [after.panels[i] == before.panels[i] for i in range(9)] == [i != 4 for i in range(9)]
    same = edit(TASK, before, 4, " ".join(map(str, before.panels[4])))
    assert same == before and not same.edited


@pytest.mark.parametrize(
    "text", ["", "1 2 3", "1 2 3 8", "1 2 3 4 5", "a b c d", "1 2 3 -4", "1.5 2 3 4", "12345", "1 2 3 x"]
)
def test_other_text_is_refused_with_what_a_panel_is(text):
    puzzle = sample(TASK, "ood", 0, shuffled=False)
    with pytest.raises(ValueError, match="A panel is 4 whole numbers from 0 to 7, such as"):
        edit(TASK, puzzle, 4, text)


def test_the_answer_its_probabilities_and_its_codes_are_those_of_the_model(solver):
    for shuffled in (False, True):
        puzzle = sample(TASK, "ood", 5, shuffled)
        answer = solver.answer(puzzle)
        shown = [value for panel in puzzle.panels[:-1] for value in panel]
        with torch.no_grad():
            out = solver.shown.model(torch.tensor([shown + [8] * 4]), output_attentions=True)
        assert answer.panel == tuple(out.logits[0].argmax(-1).tolist())
        np.testing.assert_allclose(answer.probabilities, out.logits[0].softmax(-1).numpy(), rtol=1e-5)
        for feature in range(4):
            asked = puzzle.permutations[-1][feature]
            for column in range(2):
                key = (6 + column) * 4 + puzzle.permutations[column].index(asked)
                codes = torch.stack([layer[0, :, 32 + feature, key] for layer in out.attentions])
                np.testing.assert_allclose(answer.codes[:, feature, column], codes.numpy(), rtol=1e-4, atol=1e-6)


def test_the_code_changes_with_a_rule_and_the_probe_reads_it(solver):
    before = sample(TASK, "ood", 5, shuffled=True)
    other = CONSTANT if before.rules[0] != CONSTANT else SUM
    after = with_rules(TASK, before, (other, *before.rules[1:]), shuffled=True)
    assert np.abs(solver.answer(before).codes - solver.answer(after).codes).max() > 1e-3
    rules = solver.answer(before).rules
    assert rules.shape == (4, 8)
    np.testing.assert_allclose(rules.sum(axis=1), 1)
    assert 0 <= solver.probe_accuracy <= 1 and (solver.scales > 0).all()


def test_the_verdict_on_a_unique_an_ambiguous_and_an_impossible_puzzle():
    ambiguous = {}
    for index in range(40):
        puzzle = sample(TASK, "ood", index, shuffled=True)
        found = verdict(TASK, puzzle)
        assert found.possible[puzzle.panels[-1]] > 0 and sum(found.possible.values()) == pytest.approx(1)
        assert found.mark(puzzle.panels[-1]) == "right"
        ambiguous.setdefault(len(found.possible) > 1, found)
    assert "unique: only" in ambiguous[False].words()
    assert "not unique" in ambiguous[True].words() and "probability" in ambiguous[True].words()
    other = next(panel for panel in ambiguous[True].possible if panel != ambiguous[True].right)
    assert ambiguous[True].mark(other) == "possible"

    broken = sample(TASK, "ood", 0, shuffled=False)
    for number, text in enumerate(["0 0 0 0", "0 1 3 7", "5 2 6 1", "3 3 3 1", "7 1 0 2", "1 1 4 4"]):
        broken = edit(TASK, broken, number, text)
    found = verdict(TASK, broken)
    assert found == Verdict({}, None) and found.mark((0, 0, 0, 0)) == "wrong"
    assert found.words() == "No rules explain these eight panels, so that no answer is right."


def test_an_edited_puzzle_is_judged_by_the_most_probable_panel():
    # Rows that stay the same but for one feature, whose answer follows from the panels that are shown.
    puzzle = sample(TASK, "ood", 0, shuffled=False)
    for number in range(8):
        puzzle = edit(TASK, puzzle, number, f"1 2 3 {number // 3}")
    found = verdict(TASK, puzzle)
    assert found.right == max(found.possible, key=found.possible.get) == (1, 2, 3, 2)


def test_of_equally_probable_panels_the_verdict_and_its_words_take_the_same_one():
    tied = 0
    for index in range(40):
        found = verdict(TASK, dataclasses.replace(sample(TASK, "ood", index, shuffled=True), edited=True))
        tied += list(found.possible.values()).count(max(found.possible.values())) > 1
        assert "made with" not in found.words()
    assert tied > 0


def test_the_page_says_what_was_computed(solver):
    puzzle = sample(TASK, "ood", 5, shuffled=False)
    found, answer = verdict(TASK, puzzle), solver.answer(puzzle)
    text = pages.answers(TASK, puzzle, found, [(solver, answer)], digits=False)
    assert " ".join(map(str, answer.panel)) in text and " ".join(map(str, puzzle.panels[-1])) in text
    assert text.count("latent code of") == 4 and text.count("probability of each digit") == 4
    record = solver.shown.record.metrics
    assert (
        f"Right on {record['ood']['accuracy']:.1%} of unseen and {record['test']['accuracy']:.1%} of trained" in text
    )
    assert "Unseen combination" in pages.about_puzzle(TASK, puzzle, found, False)
    trained = sample(TASK, "test", 5, shuffled=False)
    assert "Trained combination" in pages.about_puzzle(TASK, trained, verdict(TASK, trained), False)
    edited = edit(TASK, puzzle, 0, "0 0 0 0")
    assert "You changed a panel" in pages.about_puzzle(TASK, edited, verdict(TASK, edited), False)


def test_tasks_of_other_sizes_have_puzzles_too():
    for settings in ({"num_features": 2}, {"num_features": 5}, {"num_values": 11}):
        task = get_task("sraven", **settings)
        puzzle = sample(task, "ood", 0, shuffled=True)
        digits = " ".join(["1"] * task.num_features)
        assert edit(task, puzzle, 0, digits).panels[0] == (1,) * task.num_features
        assert verdict(task, puzzle).possible
    assert puzzles.PANELS == 8


def test_the_observer_takes_chosen_rules_in_any_order_also_where_the_task_has_one():
    task = get_task("sraven", num_features=2, num_values=3, permute=False)
    for index in range(40):
        for rules in ((1, 0), (6, 1)):
            puzzle = with_rules(task, sample(task, "test", index, shuffled=False), rules, shuffled=False)
            found = verdict(task, puzzle)
            assert found.right in found.possible and "No rules explain" not in found.words()
