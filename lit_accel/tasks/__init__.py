"""Ready LightningModules over models of Hugging Face and timm, and what a run of theirs needs besides."""

from lit_accel.tasks.base import LanguageModeling
from lit_accel.tasks.causal_lm import CausalLM
from lit_accel.tasks.image_classification import ImageClassification
from lit_accel.tasks.masked_lm import MaskedLM
from lit_accel.tasks.optimization import weight_decay_groups
from lit_accel.tasks.save_pretrained import SavePretrained
from lit_accel.warmup_decay import WarmupDecay

__all__ = [
    "CausalLM",
    "ImageClassification",
    "LanguageModeling",
    "MaskedLM",
    "SavePretrained",
    "WarmupDecay",
    "weight_decay_groups",
]
