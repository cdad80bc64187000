"""The closed form of vision models against the counter of torch, and by hand."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from lit_accel.anatomy import AnatomyError, anatomy_of
from lit_accel.compute import forward_flops, training_flops
from tests.models import make_model
from tests.vision import PADS_WINDOWS, VISION_ZOO, images


def counted_by_torch(model, x):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        output = model(x)
        forward = counter.get_total_flops()
        for value in output if isinstance(output, tuple) else [output]:
            value.sum().backward(retain_graph=True)
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("name", sorted(VISION_ZOO))
def test_agrees_exactly_with_the_counter_of_torch(name):
    with torch.device("meta"):
        model = make_model(name, dtype=torch.float32, heads=4, head_dim=8, ffn=64, blocks=2)
    anatomy = anatomy_of(model)
    x = images(model, batch=3).to("meta")
    shape = anatomy.input_shape((x,), {})
    counted = counted_by_torch(model, x)
    assert forward_flops(anatomy, *shape).total == counted[0]
    assert training_flops(anatomy, *shape).total == counted[1]


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_activation_checkpointing_agrees_with_the_counter_of_torch(name):
    with torch.device("meta"):
        model = make_model(name, dtype=torch.float32, heads=4, head_dim=8, ffn=64, blocks=2)
    model.set_grad_checkpointing()
    anatomy = anatomy_of(model)
    x = images(model, batch=3).to("meta")
    closed = training_flops(anatomy, *anatomy.input_shape((x,), {}), activation_checkpointing=True)
    with set_checkpoint_early_stop(False):
        counted = counted_by_torch(model, x)[1]
    assert closed.total == counted


def test_deit_base_by_hand():
    with torch.device("meta"):
        model = timm.create_model("deit_base_patch16_224")
    anatomy = anatomy_of(model)
    assert anatomy.input_shape((torch.empty(2, 3, 224, 224),), {}) == (2, 197)
    tokens, embed, blocks = 197, 768, 12
    matrices = 2 * tokens * 12 * embed**2
    attention = 2 * 2 * embed * tokens**2
    patches = 2 * 196 * embed * 3 * 16 * 16
    head = 2 * embed * 1000
    flops = forward_flops(anatomy, 1, tokens)
    assert flops.blocks == (matrices + attention,) * blocks
    assert flops.outside_blocks == patches + head
    # The image needs no gradient.
    assert training_flops(anatomy, 1, tokens).outside_blocks == 2 * patches + 3 * head


def test_swin_v2_tiny_by_hand():
    with torch.device("meta"):
        model = timm.create_model("swinv2_tiny_window8_256")
    anatomy = anatomy_of(model)
    flops = forward_flops(anatomy, 1, 64 * 64)
    blocks = []
    for stage, depth in enumerate((2, 2, 6, 2)):
        tokens, embed, heads, window = 4096 // 4**stage, 96 * 2**stage, 3 * 2**stage, 64
        matrices = 2 * tokens * 12 * embed**2
        attention = 2 * 2 * embed * tokens * window
        bias = 2 * 15 * 15 * (2 * 512 + 512 * heads)
        blocks += [matrices + attention + bias] * depth
    merging = sum(2 * 4096 // 4**stage * (96 * 2**stage) * (4 * 96 * 2 ** (stage - 1)) for stage in (1, 2, 3))
    assert flops.blocks == tuple(blocks)
    assert flops.outside_blocks == merging + 2 * 4096 * 96 * 3 * 4 * 4 + 2 * 768 * 1000


@pytest.mark.skipif(not PADS_WINDOWS, reason="this timm has no SwinV2 for images of any size")
def test_images_of_another_size():
    with torch.device("meta"):
        model = timm.create_model("swinv2_tiny_window8_256", dynamic_img_size=True)
    anatomy = anatomy_of(model)
    x = torch.empty(1, 3, 128, 128, device="meta")
    counted = counted_by_torch(model, x)[0]
    assert forward_flops(anatomy, *anatomy.input_shape((x,), {})).total == counted
    with pytest.raises(AnatomyError, match="aspect ratio"):
        forward_flops(anatomy, 1, 31)
