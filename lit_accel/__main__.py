"""``python -m lit_accel`` is ``lit-accel``."""

from lit_accel.cli import main

main()
