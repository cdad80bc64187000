"""The Trainer of the command line plans in Python, too."""

from __future__ import annotations

from lit_accel import RandomLTD
from lit_accel.cli import AccelTrainer
from tests.planning.runs import Data, facts, trained
from tests.training import TinyModule

LTD = {"start_tokens": 0.5, "quantum": 2, "pinned": [0], "growth": 30}


def test_it_prints_draws_and_returns(tmp_path, capsys):
    trainer = AccelTrainer(
        accelerator="cpu",
        max_steps=40,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[RandomLTD(**LTD)],
        default_root_dir=tmp_path,
    )
    forecast = trainer.plan(TinyModule(), Data(), calibrate=True, picture=str(tmp_path / "plan.png"))
    assert facts(forecast.plan.phases) == facts(trained(tmp_path / "run", [RandomLTD(**LTD)]).list)
    assert all(seconds > 0 for seconds in forecast.seconds)
    assert "RandomLTD" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"plan.png", "run"}
