"""The fast tests: what ``make versions`` runs at each end of the supported versions, in about five minutes of one core.

They are there to notice that torch, lightning, transformers, timm or a smaller dependency behaves otherwise. So they
take every place that touches the insides of one of those once, over all families where the families differ, and leave
out what no version changes: long runs, statistics, refusals, repeated seeds. ``make test`` runs those on one set of
versions.
"""

from __future__ import annotations

_BY_REASON: dict[str, tuple[str, ...]] = {
    # Names of modules, configs and parameters in transformers and timm: the first thing that a new version moves.
    "every family has its anatomy, and costs what the closed form says": (
        "tests/anatomy",
        "tests/compute/test_flops.py",
        "tests/compute/test_flops_vision.py",
        "tests/compute/test_ledger.py",
    ),
    # What blocks take and return, hooks, checkpointing, compiled blocks; and torch's generators.
    "blocks are intercepted, skipped and run on some tokens": (
        "tests/test_routing.py",
        "tests/test_draws.py",
        "tests/test_schedules.py",
    ),
    "multi-level: maps keep each family's function, optimizer states follow, a run goes through its sizes": (
        "tests/methods/test_multilevel_operators.py::test_growing_the_width_preserves_the_function",
        "tests/methods/test_multilevel_operators.py::test_growing_the_depth_by_empty_branches_preserves_the_function",
        "tests/methods/test_multilevel_operators.py::test_state_dicts_are_mapped_like_models",
        "tests/methods/test_multilevel_moments.py",
        "tests/methods/test_multilevel_growth.py",
        "tests/methods/test_multilevel_training.py",
    ),
    "layer dropping: both methods on every family, accumulation, compiled and checkpointed blocks": (
        "tests/methods/test_layer_dropping_training.py",
        "tests/methods/test_layer_dropping_systems.py",
        "tests/methods/test_layer_dropping_runs.py::test_a_v_cycle_is_resumed_bitwise",
    ),
    "random-LTD: subsets, masks and positions of every family, whole runs, mixed precision": (
        "tests/methods/test_token_dropping_subsets.py",
        "tests/methods/test_token_dropping_models.py",
        "tests/methods/test_token_dropping_runs.py::test_every_family_trains_and_is_charged_as_planned",
        "tests/methods/test_token_dropping_runs.py::test_mixed_precision",
        "tests/methods/test_token_dropping_systems.py::test_a_copy_is_a_plain_model",
        "tests/methods/test_token_dropping_systems.py::test_checkpointing_is_bitwise_equal",
    ),
    "mixed sparsity: units of every family, patterns of attention, whole runs, half precision": (
        "tests/methods/test_mixed_sparsity_model.py",
        "tests/methods/test_mixed_sparsity_units.py",
        "tests/methods/test_mixed_sparsity_attention.py",
        "tests/methods/test_mixed_sparsity_runs.py::test_the_loss_falls",
        "tests/methods/test_mixed_sparsity_runs.py::test_half_precision",
        "tests/methods/test_mixed_sparsity_runs.py::test_attention_follows_the_pattern_in_its_phase",
    ),
    "methods of each pair share one run": (
        "tests/composition/test_pairs.py::test_it_learns_with_every_method_at_work",
    ),
    # Lightning's loops, hooks and strategies, and FSDP2 on one process.
    "the strategies resize in mid-training, sharded too": (
        "tests/strategies/test_resizing.py::test_other_callbacks_can_resize",
        "tests/strategies/test_resizing.py::test_changed_parameter_groups_are_refused",
        "tests/strategies/test_resizing.py::test_options_of_the_wrapper_survive",
        "tests/strategies/test_model_parallel.py",
    ),
    "checkpoints: bitwise resumes, weights-only files, models that load without this package": (
        "tests/checkpoints",
        "tests/methods/test_multilevel_checkpoints.py",
        "tests/composition/test_pairs.py::test_micro_batches_of_three_methods_and_their_resume",
    ),
    # tokenizers, datasets, pillow and scikit-learn; Hugging Face's and timm's own loss, names and folders.
    "data and tasks": (
        "tests/data/test_images.py",
        "tests/data/test_text.py::test_a_dataset_on_disk",
        "tests/data/test_text.py::test_a_saved_tokenizer_is_used_as_it_is",
        "tests/data/test_text.py::test_encoding_loses_nothing",
        "tests/tasks",
    ),
    # jsonargparse and LightningCLI; what they say of errors is read and cut down, so its wording matters too.
    "the command line parses every recipe, refuses what is wrong, and runs, resumes and validates": (
        "tests/bad_input/test_command_keys.py",
        "tests/bad_input/test_command_methods.py",
        "tests/bad_input/test_command_trainer.py",
        "tests/test_cli.py::test_recipes_parse",
        "tests/test_cli.py::test_whole_numbers_stay_whole",
        "tests/test_cli.py::test_two_files_compose_into_a_run",
        "tests/test_cli.py::test_a_run_of_the_command_line_can_be_loaded_resumed_and_validated",
        "tests/test_cli.py::test_a_resumed_command_keeps_its_own_optimizer",
    ),
    # scipy, plotly, matplotlib and rich.
    "plans and reports": (
        "tests/planning/test_trainer.py",
        "tests/report/test_command.py",
        "tests/report/test_curve.py",
    ),
}

FAST_TESTS: tuple[str, ...] = tuple(test for tests in _BY_REASON.values() for test in tests)
