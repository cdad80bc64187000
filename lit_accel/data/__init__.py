"""Data modules over real data."""

from lit_accel.data.images import ImageDataModule
from lit_accel.data.text import TextDataModule

__all__ = ["ImageDataModule", "TextDataModule"]
