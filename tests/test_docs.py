"""What the documentation says runs, and its numbers are those of the result files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts import report_results
from tests.training import TinyModule, loader

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "lit_accel/methods/multilevel/README.md",
    "lit_accel/methods/layer_dropping/README.md",
    "lit_accel/methods/token_dropping/README.md",
    "lit_accel/methods/mixed_sparsity/README.md",
    "docs/new_family.md",
    "docs/composition.md",
    "docs/plan_and_report.md",
    "docs/robustness.md",
    "docs/results/README.md",
    "docs/results/protocol.md",
    "configs/README.md",
]


def snippets():
    for document in DOCUMENTS:
        for index, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)):
            # A line of a table, not a program.
            if not code.startswith('"'):
                yield pytest.param(code, id=f"{document}-{index}")


@pytest.mark.parametrize("code", list(snippets()))
def test_snippets_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = code.replace("max_steps=10_000", 'max_steps=20, accelerator="cpu", enable_progress_bar=False')
    exec(compile(code, "<snippet>", "exec"), {"any_lightning_module": TinyModule(), "datamodule": loader()})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_exist(document):
    path = ROOT / document
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert all((path.parent / link).exists() for link in links)
    for config in re.findall(r"configs/[\w/]+\.yaml", text):
        assert (ROOT / config).exists()


def test_tables_are_what_the_result_files_give(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["report_results", "--check"])
    report_results.main()


def test_the_demo(tmp_path, monkeypatch, capsys):
    """The whole demo at a fiftieth of its size."""
    import lit_accel.anatomy
    from scripts import demo
    from scripts.small_gpt import Setup

    monkeypatch.chdir(tmp_path)
    demo.run_demo(
        Setup(
            num_blocks=2,
            embed=32,
            heads=4,
            vocab_size=300,
            block_size=32,
            batch_size=4,
            num_steps=40,
            val_batches=2,
            max_bytes=200_000,
        )
    )
    printed = capsys.readouterr().out
    assert "What it cost" in printed
    assert "Verdict" in printed
    assert (tmp_path / "runs/demo/report.png").stat().st_size > 10_000
    model = demo.GPT2LMHeadModel.from_pretrained(tmp_path / "runs/demo/model")
    assert lit_accel.anatomy.anatomy_of(model).size.depths == (2,)
    runs = {name: demo.read_ledger(tmp_path / "runs/demo" / name) for name in ("dense", "v_cycle")}
    assert runs["v_cycle"].flops[-1] <= 0.8 * runs["dense"].flops[-1]
    assert runs["v_cycle"].flops[-1] > 0.7 * runs["dense"].flops[-1]
