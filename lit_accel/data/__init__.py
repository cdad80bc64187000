"""Data modules over real data."""

from lit_accel.data.text import TextDataModule

__all__ = ["TextDataModule"]
