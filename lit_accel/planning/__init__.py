"""What a run will cost and need, before anything is trained; ``lit-accel plan`` prints it."""

from lit_accel.planning.first_call import PlanError
from lit_accel.planning.forecast import Forecast, PhaseMemory, plan

__all__ = ["Forecast", "PhaseMemory", "PlanError", "plan"]
