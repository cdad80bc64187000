"""What does not go together is refused before training, in both orders; what is doubtful is said once."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lit_accel import Level, MultiLevelTraining, Phase, ProgressiveLayerDropping, SensitivityLayerDropping
from lit_accel.methods.compatibility import MST, MULTI_LEVEL, PAIRS, PLD, RANDOM_LTD, SBLD, check_pairs, pair_of
from tests.composition.runs import METHODS, NEUTRAL, Host, run

BOTH_ORDERS = pytest.mark.parametrize("reverse", [False, True], ids=["", "reversed"])


def refused(folder, methods, match, name="gpt2-tied", reverse=False, **options):
    module = Host(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=match):
        run(folder, methods[::-1] if reverse else methods, module=module, strategy="resizable", **options)
    assert not module.seen
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


# Pairs


@BOTH_ORDERS
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.verdict == "refuse"], ids=lambda p: p.first + p.second)
def test_refused_pairs(tmp_path, pair, reverse):
    methods = [METHODS[pair.first](), METHODS[pair.second]()]
    names = "ProgressiveLayerDropping and SensitivityLayerDropping|SensitivityLayerDropping and ProgressiveLayer"
    refused(tmp_path, methods, f"({names}).* would both drop layers of one model", reverse=reverse)


@BOTH_ORDERS
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.verdict == "warn"], ids=lambda p: p.first + p.second)
def test_doubtful_pairs_are_warned_about_before_training(tmp_path, pair, reverse):
    methods = [METHODS[pair.first](), METHODS[pair.second]()]
    if pair.first == MULTI_LEVEL:
        methods[1] = METHODS[MST](stages=[(0, 0.0), (9, 0.5), (12, 0.0)])
    made = run(tmp_path, methods[::-1] if reverse else methods, strategy="resizable", max_steps=13)
    said = [warning for warning in made.warnings if pair.reason in warning]
    assert len(said) == 1
    assert {type(method).__name__ for method in methods} == set(said[0].split(" in one run: ")[0].split(" and "))


def test_a_second_fit_with_the_same_trainer_does_not_repeat_it(tmp_path):
    made = run(tmp_path, [METHODS[PLD](), METHODS[MST]()], max_steps=18)
    assert sum(pair_of(PLD, MST).reason in warning for warning in made.warnings) == 1
    trainer = made.module.kept_trainer
    trainer.fit_loop.epoch_loop.max_steps = 20
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(made.module, DataLoader(range(256), batch_size=4))
    assert trainer.global_step == 20
    assert not [each for each in said if pair_of(PLD, MST).reason in str(each.message)]


# Two of one kind


class MyDropping(ProgressiveLayerDropping):
    pass


class MyLevels(MultiLevelTraining):
    pass


TWINS = {
    "layers": lambda: [METHODS[PLD](), MyDropping(theta=0.8)],
    "sensitivities": lambda: [METHODS[SBLD](), type("MySensitivity", (SensitivityLayerDropping,), {})(kept=0.9)],
    "levels": lambda: [METHODS[MULTI_LEVEL](), MyLevels()],
    "tokens": lambda: [METHODS[RANDOM_LTD](), type("MyLTD", (type(METHODS[RANDOM_LTD]()),), {})()],
    "units": lambda: [METHODS[MST](), type("MyUnits", (type(METHODS[MST]()),), {})()],
}
DOES = {
    "layers": "drop layers",
    "sensitivities": "drop layers",
    "levels": "change the size",
    "tokens": "drop tokens",
    "units": "switch units",
}


@BOTH_ORDERS
@pytest.mark.parametrize("kind", TWINS)
def test_two_of_one_kind(tmp_path, kind, reverse):
    refused(tmp_path, TWINS[kind](), f" and .* would both {DOES[kind]} of one model. Use one", reverse=reverse)


def test_two_of_one_class():
    # In a Trainer, Lightning itself does not take two of one class.
    with pytest.raises(MisconfigurationException, match="Two RandomLTD callbacks would drop tokens of one model"):
        check_pairs([METHODS[RANDOM_LTD](), METHODS[RANDOM_LTD]()])
    assert check_pairs([METHODS[RANDOM_LTD](), NEUTRAL[RANDOM_LTD]()]) == []


def test_one_of_them_neutral_is_one(tmp_path):
    made = run(tmp_path, [METHODS[PLD](), type("Neutral", (ProgressiveLayerDropping,), {})(theta=1.0)], max_steps=2)
    assert len(made.module.seen) == 2


# Settings that clash


@BOTH_ORDERS
@pytest.mark.parametrize("title", [PLD, SBLD])
def test_tokens_that_never_come_back_beside_dropped_layers(tmp_path, title, reverse):
    methods = [METHODS[title](), METHODS[RANDOM_LTD](scope="input")]
    match = r'do not go together as they are set: scope="input" takes tokens out before the first block, which .* skip'
    refused(tmp_path, methods, match, "vit", reverse)
    # Beside a neutral one they may.
    assert run(tmp_path, [NEUTRAL[title](), METHODS[RANDOM_LTD](scope="input")], "vit", max_steps=2).module.seen


PATTERN = {"attention_pattern": "window", "attention_window": 3}


@BOTH_ORDERS
@pytest.mark.parametrize(
    ("phase", "growth", "shared"),
    [((4, 12), 8, "4 to 7"), ((0, 2), 8, "0 to 1"), ((0.2, 0.8), 0.5, "4 to 8"), ((7, 9), 8, "7 to 7")],
)
def test_a_pattern_of_attention_among_kept_tokens(tmp_path, phase, growth, shared, reverse):
    methods = [METHODS[RANDOM_LTD](growth=growth), METHODS[MST](**PATTERN, attention_phase=phase)]
    end = growth if isinstance(growth, int) else round(18 * growth)
    match = rf'in steps {shared} RandomLTD drops tokens .* pattern "window".*begin at step {end} or later'
    refused(tmp_path, methods, match, reverse=reverse)


@pytest.mark.parametrize("phase", [(8, 16), (10, 12), (0.5, 0.8)])
def test_a_pattern_after_the_last_dropped_token(tmp_path, phase):
    methods = [METHODS[RANDOM_LTD](growth=8), METHODS[MST](**PATTERN, attention_phase=phase)]
    made = run(tmp_path, methods)
    follows = [call["step"] for call in made.ran.calls if call["active"].pairs is not None]
    dropped = [step for step, tokens in made.ran.tokens.items() if set(tokens) != {12}]
    assert max(dropped) == 7
    assert min(follows) >= 8


@pytest.mark.parametrize("stages", [[(0, 0.0)], [(0, 0.0), (5, 0.5), (10, 0.0)]])
def test_dense_attention_in_a_phase_is_no_pattern(tmp_path, stages):
    methods = [METHODS[RANDOM_LTD](growth=8), METHODS[MST](stages=stages, attention_phase=(0, 8))]
    assert len(run(tmp_path, methods, max_steps=11).module.seen) == 11


@BOTH_ORDERS
@pytest.mark.parametrize(
    ("phases", "stages", "step", "sparsity"),
    [
        # Within a stage, at its first step, and right at the step at which all come back.
        ([Phase(0, 7), Phase(1, 4), Phase(0)], [(0, 0.0), (5, 0.5), (9, 0.0)], 7, 0.5),
        ([Phase(0, 5), Phase(1, 4), Phase(0)], [(0, 0.0), (5, 0.25), (9, 0.0)], 5, 0.25),
        ([Phase(0, 2), Phase(1, 4), Phase(0)], [(0, 0.0), (4, 0.5), (6, 0.0)], 6, 0.5),
        ([Phase(0, 0.5), Phase(1, 0.1), Phase(0)], [(0, 0.0), (0.1, 0.75), (0.9, 0.0)], 9, 0.75),
    ],
)
def test_a_change_of_size_while_units_are_off(tmp_path, phases, stages, step, sparsity, reverse):
    methods = [MultiLevelTraining([Level()], phases), METHODS[MST](stages=stages)]
    match = rf"changes the size of the model at step {step}, where the sparsity is {sparsity}: .* Let stages be 0"
    refused(tmp_path, methods, match, reverse=reverse)


def test_sparse_within_the_small_phase_is_allowed(tmp_path):
    methods = [
        MultiLevelTraining([Level()], [Phase(0, 2), Phase(1, 9), Phase(0)]),
        METHODS[MST](stages=[(0, 0.0), (3, 0.5), (9, 0.0)]),
    ]
    made = run(tmp_path, methods, strategy="resizable", max_steps=14)
    sparse = [call["step"] for call in made.ran.calls if call["active"].stage == 1]
    assert sparse == [3, 4, 5, 6, 7, 8]
    assert {len(made.ran.keep[step]) for step in sparse} == {3}


def test_a_level_too_shallow_for_another_method(tmp_path):
    # Of three blocks the first and the last see every token.
    levels = MultiLevelTraining([Level(depth=3)], [Phase(0, 3), Phase(1, 5), Phase(0)])
    match = "At level 1 of MultiLevelTraining: There is no layer to drop tokens in: of the 2 blocks"
    refused(tmp_path, [levels, METHODS[RANDOM_LTD]()], match)
    levels = MultiLevelTraining([Level(depth=6)], [Phase(0, 3), Phase(1, 5), Phase(0)])
    match = "At level 1 of MultiLevelTraining: .* needs at least two blocks that it may drop"
    refused(tmp_path, [levels, METHODS[PLD]()], match)
