"""The phases of the cycle that is killed, as (level, optimizer steps)."""

PHASES = [(0, 3), (1, 3), (2, 4), (1, 3), (0, None)]
SWITCHES = [3, 6, 10, 13]
STEPS = 17
