"""BERT's masking, for masked language modelling (Devlin et al. 2019, arXiv:1810.04805, appendix A.1)."""

import torch
from torch import Tensor

IGNORE_INDEX = -100  # what torch.nn.functional.cross_entropy, and so every Hugging Face model, skips


def mask_tokens(
    ids_t: Tensor,
    generator: torch.Generator,
    *,
    mask_id: int,
    num_tokens: int,
    special_ids: Tensor,
    probability: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Hides some tokens of one window and asks for them back.

    A fraction `probability` of the ordinary tokens is selected. Of these about 80 % become the mask token, 10 %
    become a random token, and 10 % stay as they are, so that the model cannot know which inputs to trust.

    The number selected is exact (rounded, at least one) and not a coin for each token: this is what BERT's own
    code does, and a short window without any target would make the mean loss NaN.

    Args:
        ids_t: Token ids of one window, int64 of shape (t,). Not changed.
        generator: The source of every draw.
        mask_id: Id of the mask token.
        num_tokens: Random replacements are drawn from `[0, num_tokens)`.
        special_ids: Ids that are never selected, int64 of shape (s,).
        probability: Fraction of the ordinary tokens to select, in (0, 1).

    Returns:
        Inputs and labels, both int64 of shape (t,). Labels hold the original id where a token was selected, and
        -100 elsewhere. A window of special tokens only has no labels.
    """
    ordinary_t = ~torch.isin(ids_t, special_ids)
    num_ordinary = int(ordinary_t.sum())
    num_selected = min(num_ordinary, max(1, round(probability * num_ordinary)))

    order_t = torch.rand(len(ids_t), generator=generator).masked_fill(~ordinary_t, 2.0).argsort()
    selected = order_t[:num_selected]
    fate = torch.rand(num_selected, generator=generator)
    replacement = torch.randint(num_tokens, (num_selected,), generator=generator)
    replacement = torch.where(fate < 0.8, mask_id, torch.where(fate < 0.9, replacement, ids_t[selected]))

    inputs_t = ids_t.clone()
    inputs_t[selected] = replacement
    labels_t = torch.full_like(ids_t, IGNORE_INDEX)
    labels_t[selected] = ids_t[selected]
    return inputs_t, labels_t
