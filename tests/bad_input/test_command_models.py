"""Models, optimizers and schedules that cannot be built, or not from this data."""

from __future__ import annotations

import pytest

from tests.bad_input.harness import run_command
from tests.bad_input.rows import overrides, wrong

LTD = "--trainer.callbacks+=lit_accel.RandomLTD"


ROWS = [
    # Models
    wrong(
        "a model type that is none",
        "--model.model=gtp2",
        "model='gtp2' is no model type of transformers, no folder written by",
    ),
    wrong(
        "a folder that holds no model",
        "--model.model=./empty",
        "The folder ./empty, given as model, has no configuration that transformers",
        files={"empty/readme.txt": "nothing"},
    ),
    wrong(
        "a folder that is not there",
        "--model.model=./missing/model",
        "There is no folder ./missing/model, given as model. Give a folder that",
    ),
    wrong(
        "a folder with a broken config.json",
        "--model.model=./broken",
        "The folder ./broken, given as model, has no configuration that",
        files={"broken/config.json": "{"},
    ),
    wrong(
        "a folder with a config of no known type",
        "--model.model=./odd",
        "The folder ./odd, given as model, has no configuration that transformers",
        files={"odd/config.json": '{"model_type": "qpt9"}'},
    ),
    wrong(
        "a folder of configuration without weights",
        "--model.model=./bare",
        "model='./bare' cannot be built with overrides {'n_embd': 16, 'n_head': 4,",
        files={"bare/config.json": '{"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 262}'},
    ),
    wrong(
        "a folder whose weights are cut off",
        "--model.model=./cut",
        "model='./cut' cannot be built with overrides {'n_embd': 16, 'n_head': 4,",
        files={
            "cut/config.json": '{"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 262}',
            "cut/model.safetensors": b"\x10\x00\x00\x00\x00\x00\x00\x00{}",
        },
    ),
    wrong(
        "an unknown field",
        overrides(n_layers=3),
        "overrides: GPT2Config has no field 'n_layers' (did you mean 'n_layer' or",
    ),
    wrong(
        "a width that heads do not divide",
        overrides(n_embd=18),
        "model='gpt2' cannot be built with overrides {'n_layer': 4, 'n_embd': 18,",
    ),
    wrong("no heads", overrides(n_head=0), "n_head of overrides is 0; it is a whole number, at least 1."),
    wrong("no blocks", overrides(n_layer=0), "n_layer of overrides is 0; it is a whole number, at least 1."),
    wrong(
        "fewer than no blocks", overrides(n_layer=-2), "n_layer of overrides is -2; it is a whole number, at least 1."
    ),
    wrong(
        "text for a number of blocks",
        overrides(n_layer='"four"'),
        "n_layer of overrides is 'four'; it is a whole number, at least 1.",
    ),
    wrong(
        "a fraction of a width",
        overrides(n_embd=16.5),
        "n_embd of overrides is 16.5; it is a whole number, at least 1.",
    ),
    wrong(
        "an activation that is none",
        overrides(activation_function='"gleu"'),
        "model='gpt2' cannot be built with overrides {'n_layer': 4, 'n_embd': 16,",
    ),
    wrong(
        "dropout above one",
        overrides(resid_pdrop=1.5),
        "model='gpt2' cannot be built with overrides {'n_layer': 4, 'n_embd': 16,",
    ),
    wrong(
        "an attention that is none",
        overrides(attn_implementation='"flashy"'),
        "model='gpt2' cannot be built with overrides {'n_layer': 4, 'n_embd': 16,",
    ),
    wrong(
        "a vocabulary that is not the data's",
        overrides(vocab_size=100),
        "overrides says vocab_size=100, but the data's vocabulary has 262 tokens.",
    ),
    wrong(
        "a vocabulary of the model that is not the data's",
        "--model.vocab_size=100",
        "model.init_args.vocab_size is 100, but the data has 262, which the model",
    ),
    wrong(
        "sequences longer than the model's positions",
        "--data.block_size=32",
        "The texts of TextDataModule have 32 tokens (block_size), and the model has",
    ),
    wrong(
        "sequences longer than BERT's positions",
        "--data.block_size=32",
        "The texts of TextDataModule have 32 tokens (block_size), and the model has",
        base="bert",
    ),
    wrong(
        "a causal model for masked data",
        "--data.objective=masked",
        'CausalLM needs data with objective="causal", and that of TextDataModule is',
    ),
    wrong(
        "a masked model for causal data",
        "--data.objective=causal",
        'MaskedLM needs data with objective="masked", and that of TextDataModule is',
        base="bert",
    ),
    wrong(
        "an encoder that has no causal head",
        "--model.model=vit",
        "model='vit' has no head for this task: transformers has no",
    ),
    wrong(
        "an encoder-decoder",
        ("--model.model=t5", "--model.overrides=null"),
        "model='t5' has no head for this task: transformers has no",
    ),
    wrong(
        "a family without an anatomy",
        (LTD, "--model.model=mpt", '--model.overrides={"d_model": 16, "n_heads": 4, "n_layers": 4, "max_seq_len": 16}'),
        "No transformer with a registered anatomy is inside CausalLM; it holds",
    ),
    wrong(
        "a timm model that is none",
        "--model.model=diet_tiny_patch16_224",
        "timm has no model 'diet_tiny_patch16_224'; timm.list_models() names them",
        base="vit",
    ),
    wrong(
        "an unknown argument of a timm model",
        '--model.model_kwargs={"patch_size": 4, "deepth": 3}',
        "timm cannot build 'deit_tiny_patch16_224' from model_kwargs and the shape",
        base="vit",
    ),
    wrong(
        "a ViT without heads",
        '--model.model_kwargs={"patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 0}',
        "num_heads of model_kwargs is 0; it is a whole number, at least 1.",
        base="vit",
    ),
    wrong(
        "patches that do not divide the image",
        '--model.model_kwargs={"patch_size": 3, "embed_dim": 16, "depth": 4, "num_heads": 4}',
        "Patches of 3 pixels (patch_size of model_kwargs) do not divide images of",
        base="vit",
    ),
    wrong(
        "images that the patches of a model's name do not divide",
        ("--model.model_kwargs=null", "--data.image_size=24"),
        "Patches of 16 pixels (patch_size of model_kwargs) do not divide images of",
        base="vit",
    ),
    wrong(
        "heads that do not divide the width of a ViT",
        '--model.model_kwargs={"patch_size": 4, "embed_dim": 18, "depth": 4, "num_heads": 4}',
        "timm cannot build 'deit_tiny_patch16_224' from model_kwargs and the shape",
        base="vit",
    ),
    wrong(
        "classes that are not the data's",
        '--model.model_kwargs={"patch_size": 4, "num_classes": 3}',
        "model_kwargs says num_classes=3, but the data has num_classes=10. Leave it",
        base="vit",
    ),
    wrong(
        "a convolutional model with a method",
        (LTD, "--model.model=resnet18", "--model.model_kwargs=null"),
        "No transformer with a registered anatomy is inside ImageClassification; it",
        base="vit",
    ),
    wrong(
        "odd batches for mixup",
        ("--model.mixup=0.8", "--data.batch_size=3"),
        "mixup and cutmix blend images by twos, and the batch_size of",
        base="vit",
    ),
    wrong(
        "label smoothing of one",
        "--model.label_smoothing=1",
        "label_smoothing must be a share, in [0, 1), and is 1.0",
        base="vit",
    ),
    wrong(
        "text for image classification",
        (
            "--data=lit_accel.data.TextDataModule",
            "--data.source=text.txt",
            "--data.tokenizer=bytes",
            "--data.block_size=8",
        ),
        "ImageClassification learns from images of classes, and TextDataModule has",
        base="vit",
    ),
    wrong(
        "images for a language model",
        ("--data=lit_accel.data.ImageDataModule", "--data.source=digits"),
        "CausalLM learns from text, and ImageDataModule has images of classes. Give",
    ),
    # Optimizers and schedules
    wrong(
        "a negative learning rate",
        ("--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=-1"),
        "optimizer cannot be made from its settings: Invalid learning rate: -1.0.",
    ),
    wrong(
        "a moment's decay of one",
        ("--model.optimizer=torch.optim.AdamW", "--model.optimizer.betas=[0.9, 1.0]"),
        "optimizer cannot be made from its settings: Invalid beta parameter at",
    ),
    wrong(
        "a negative weight decay",
        "--model.weight_decay=-0.1",
        "weight_decay is -0.1; it is a number, at least 0, or None.",
    ),
    wrong(
        "a warm-up above the whole run",
        ("--model.lr_scheduler=lit_accel.tasks.WarmupDecay", "--model.lr_scheduler.num_warmup_steps=1.5"),
        "lr_scheduler cannot be made from its settings: A duration is a number of",
    ),
    wrong(
        "a negative warm-up",
        ("--model.lr_scheduler=lit_accel.tasks.WarmupDecay", "--model.lr_scheduler.num_warmup_steps=-3"),
        "lr_scheduler cannot be made from its settings: A duration is a number of",
    ),
    wrong(
        "a schedule without its argument",
        "--model.lr_scheduler=torch.optim.lr_scheduler.StepLR",
        "model.lr_scheduler: CausalLM needs step_size, which is missing. See",
        code=2,
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_refused_before_training(row, tmp_path, monkeypatch, capsys, cache):
    run_command(row, tmp_path, cache, monkeypatch, capsys)
