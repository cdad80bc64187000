"""Draw what each step of a recipe of three methods costs: docs/pictures/plan.png, by ``lit-accel plan`` itself."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lit_accel.cli import LitAccelCLI

ROOT = Path(__file__).parents[1]


def main() -> None:
    config, picture = ROOT / "configs/recipe/gpt2_all.yaml", ROOT / "docs/pictures/plan.png"
    # The data keeps its tokens where it is called.
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        LitAccelCLI(["plan", "--config", str(config), "--picture", str(picture)])


if __name__ == "__main__":
    main()
