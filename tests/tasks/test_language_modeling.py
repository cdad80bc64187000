import functools
import math

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lit_accel.anatomy import anatomy_of
from lit_accel.data import TextDataModule
from lit_accel.methods.multilevel import coalesce, level_map
from lit_accel.schedules import warmup_decay_factor
from lit_accel.tasks import CausalLM, MaskedLM, SavePretrained, WarmupDecay, weight_decay_groups

VOCAB_SIZE, BLOCK_SIZE = 61, 12
GPT2 = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 16}
LLAMA = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
         "intermediate_size": 24, "max_position_embeddings": 16}  # fmt: skip
QWEN3 = {**LLAMA, "head_dim": 8}
BERT = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 16}  # fmt: skip
TASKS = {
    "gpt2": (CausalLM, GPT2),
    "llama": (CausalLM, LLAMA),
    "qwen3": (CausalLM, QWEN3),
    "bert": (MaskedLM, BERT),
}


def make_task(model_type="gpt2", **arguments):
    task_class, overrides = TASKS[model_type]
    seed_everything(1, verbose=False)
    return task_class(model_type, **{"overrides": overrides, "vocab_size": VOCAB_SIZE, **arguments})


def make_batch(batch_size=3, seed=0):
    """A batch in which texts differ in the number of their targets."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(VOCAB_SIZE, (batch_size, BLOCK_SIZE), generator=generator)
    hidden = torch.rand(input_ids.shape, generator=generator) < 0.4
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(hidden, -100)}


class Batches(LightningDataModule):
    def __init__(self, num_batches=2):
        super().__init__()
        self.num_batches = num_batches

    def _batches(self, first_seed):
        batches = [make_batch(batch_size=1 + i, seed=first_seed + i) for i in range(self.num_batches)]
        return DataLoader(batches, batch_size=None)

    def train_dataloader(self):
        return self._batches(0)

    def val_dataloader(self):
        return self._batches(100)

    def test_dataloader(self):
        return self._batches(100)

    def predict_dataloader(self):
        return self._batches(100)


def make_trainer(tmp_path, **options):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return Trainer(default_root_dir=tmp_path, **{**quiet, "enable_checkpointing": False, **options})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    make_task("gpt2").model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("model_type", TASKS)
def test_loss_is_hugging_faces_own(model_type):
    task, batch = make_task(model_type).eval(), make_batch()
    ours = task.training_step(batch, 0)
    theirs = task.model(**batch).loss
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


def test_padding_is_not_attended_to():
    task, batch = make_task("llama").eval(), make_batch()
    attention_mask = torch.ones_like(batch["input_ids"])
    attention_mask[0, -4:] = 0
    padded = task(batch["input_ids"], attention_mask)
    assert torch.allclose(padded[0, :-4], task(batch["input_ids"])[0, :-4], atol=1e-6)
    predicted = task.predict_step({**batch, "attention_mask": attention_mask}, 0)
    assert torch.equal(predicted, torch.stack([padded[0, -5], padded[1, -1], padded[2, -1]]))


@pytest.mark.parametrize("model_type", ["gpt2", "bert"])
def test_held_out_metrics_weigh_every_token_the_same(model_type, tmp_path):
    task, data = make_task(model_type), Batches(num_batches=3)
    trainer = make_trainer(tmp_path)
    (logged,) = trainer.validate(task, data, verbose=False)
    (tested,) = trainer.test(task, data, verbose=False)

    total, correct, count = 0.0, 0, 0
    for batch in data.val_dataloader():
        labels = batch["labels"]
        logits = task.eval().model(batch["input_ids"]).logits.double()
        if model_type == "gpt2":
            logits, labels = logits[:, :-1], labels[:, 1:]
        kept = labels != -100
        total -= logits[kept].log_softmax(-1).gather(-1, labels[kept][:, None]).sum().item()
        correct += (logits[kept].argmax(-1) == labels[kept]).sum().item()
        count += kept.sum().item()

    assert logged["val/loss"] == pytest.approx(total / count, rel=1e-6)
    assert logged["val/perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert logged["val/accuracy"] == pytest.approx(correct / count)
    assert {name.replace("test/", "val/"): value for name, value in tested.items()} == logged


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
def test_held_out_metrics_add_up_in_32_bits(precision, tmp_path):
    """A sum of 16 bits stops growing after some hundred tokens, or overflows."""
    task = make_task()
    trainer = make_trainer(tmp_path, precision=precision)
    batches = Batches(num_batches=40)
    got = trainer.validate(task, batches, verbose=False)[0]
    expected = make_trainer(tmp_path).validate(make_task(), batches, verbose=False)[0]
    assert got["val/loss"] == pytest.approx(expected["val/loss"], rel=0.01)
    assert got["val/perplexity"] == pytest.approx(math.exp(got["val/loss"]), rel=1e-5)


def test_the_first_batch_that_a_run_sees_is_checked(tmp_path):
    data = Batches()
    data.val_dataloader = lambda: DataLoader([[torch.zeros(1, 3)]], batch_size=None)
    with pytest.raises(TypeError, match="mappings with input_ids"):
        make_trainer(tmp_path, num_sanity_val_steps=1).fit(make_task(), data)


def test_positions_are_those_that_tokens_can_have(tmp_path):
    """RoBERTa's begin after that of padding."""
    task = MaskedLM("roberta", overrides={**BERT, "max_position_embeddings": 18}, vocab_size=VOCAB_SIZE)
    for length, message in ((16, None), (17, "positions for 16")):
        data = Batches()
        data.block_size = length
        trainer = make_trainer(tmp_path, limit_val_batches=0, max_steps=1)
        if message is None:
            trainer.fit(task, data)
        else:
            with pytest.raises(ValueError, match=message):
                trainer.fit(task, data)


def test_a_batch_without_targets_costs_nothing():
    task, batch = make_task(), make_batch()
    loss = task.training_step({**batch, "labels": torch.full_like(batch["labels"], -100)}, 0)
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in task.parameters() if p.grad is not None)


@pytest.mark.parametrize(("model_type", "shape"), [("gpt2", (1, VOCAB_SIZE)), ("bert", (1, BLOCK_SIZE, VOCAB_SIZE))])
def test_predictions(model_type, shape, tmp_path):
    first, second = make_trainer(tmp_path).predict(make_task(model_type), Batches())
    assert first.shape == shape
    assert len(second) == 2


@pytest.mark.parametrize("model_type", TASKS)
def test_weight_decay_groups_are_complete_and_disjoint(model_type):
    task = make_task(model_type)
    next(task.model.base_model.parameters()).requires_grad_(False)
    decaying, rest = weight_decay_groups(task, weight_decay=0.3)
    assert {p.ndim for p in rest["params"]} == {1}
    assert all(p.ndim >= 2 for p in decaying["params"])
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.3, 0)
    grouped = [id(p) for p in decaying["params"] + rest["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in task.parameters() if p.requires_grad}


def test_weight_decay_is_left_to_the_optimizer_by_default():
    optimizer = make_task(optimizer=functools.partial(torch.optim.AdamW, weight_decay=0.07)).configure_optimizers()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.07, 0]


def test_optimizers_are_made_anew_over_the_present_parameters():
    task = make_task()
    before = task.configure_optimizers()
    task.model = make_task(overrides={**GPT2, "n_embd": 8}).model
    after = task.configure_optimizers()
    held = {id(p) for group in after.param_groups for p in group["params"]}
    assert after is not before
    assert held == {id(p) for p in task.parameters()}


def test_plateau_schedulers_keep_their_monitor():
    configured = make_task(lr_scheduler=lambda o: ReduceLROnPlateau(o, monitor="val/loss")).configure_optimizers()
    assert configured["lr_scheduler"]["monitor"] == "val/loss"


def test_the_schedule_is_bound_to_the_length_of_the_run(tmp_path):
    task = make_task(
        optimizer=functools.partial(torch.optim.AdamW, lr=0.01),
        lr_scheduler=functools.partial(WarmupDecay, num_warmup_steps=2, decay="cosine"),
    )
    rates = []
    task.on_before_optimizer_step = lambda optimizer: rates.append(optimizer.param_groups[0]["lr"])
    make_trainer(tmp_path, max_steps=5, max_epochs=-1, limit_val_batches=0).fit(task, Batches())
    curve = {"num_warmup_steps": 2, "num_total_steps": 5, "decay": "cosine"}
    assert rates == [0.01 * warmup_decay_factor(step, **curve) for step in range(5)]


def test_an_endless_run_has_no_schedule_to_follow(tmp_path):
    task = make_task(lr_scheduler=WarmupDecay)
    message = r"WarmupDecay must know how long the run is\. .* max_steps.* or give it num_total_steps"
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(tmp_path, max_epochs=-1).fit(task, Batches())


@pytest.mark.parametrize("model_type", ["gpt2", "bert"])
def test_load_from_checkpoint_restores_the_weights(model_type, tmp_path):
    task = make_task(
        model_type,
        optimizer=functools.partial(torch.optim.AdamW, lr=0.01),
        lr_scheduler=functools.partial(WarmupDecay, decay="linear"),
    )
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    trainer.fit(task, Batches())
    for weights_only in (False, True):
        trainer.save_checkpoint(tmp_path / "run.ckpt", weights_only=weights_only)
        checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
        assert all(name.startswith("model.") for name in checkpoint["state_dict"])
        loaded = type(task).load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(task.parameters(), loaded.parameters(), strict=True))


def test_resuming_gives_the_run_that_was_not_interrupted(tmp_path):
    def fit(num_steps, ckpt_path=None):
        task = make_task(lr_scheduler=functools.partial(WarmupDecay, num_warmup_steps=0.5, num_total_steps=4))
        trainer = make_trainer(tmp_path, max_steps=num_steps, limit_val_batches=0, max_epochs=-1)
        seed_everything(7, verbose=False)
        # One batch, for where in the data a run resumes is the data loader's affair.
        trainer.fit(task, Batches(num_batches=1), ckpt_path=ckpt_path)
        return trainer, task

    dropless = {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "gpt2", (CausalLM, dropless))
        _, whole = fit(4)
        half, _ = fit(2)
        half.save_checkpoint(tmp_path / "half.ckpt")
        _, resumed = fit(4, ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_seed_decides_the_initialisation():
    first, second = make_task(), make_task()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_field_that_does_not_exist_is_refused_with_the_one_that_was_meant():
    with pytest.raises(ValueError, match=r"'n_layers'.*'n_layer'"):
        make_task(overrides={**GPT2, "n_layers": 2})


def test_a_field_may_go_by_its_common_name():
    task = make_task(overrides={**GPT2, "num_hidden_layers": 3, "attn_implementation": "eager"})
    assert len(task.model.transformer.h) == 3
    assert task.model.config._attn_implementation == "eager"


def test_special_tokens_beyond_the_vocabulary_are_dropped():
    config = make_task().model.config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (VOCAB_SIZE, None, None)


def text_of(folder, **arguments):
    for name in ("one", "other"):
        (folder / f"{name}.txt").write_text(f"This is {name} text.\n" * 40)
    shape = {"tokenizer": "bpe", "vocab_size": 300, "block_size": 8, "batch_size": 2, "val_fraction": 0.5}
    return TextDataModule(str(folder), **{**shape, "cache_dir": folder / "cache", **arguments})


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3"])
def test_a_new_model_knows_with_which_token_its_texts_end(model_type, tmp_path):
    """Its configuration names the tokens of the vocabulary that its type was published with."""
    task, data = make_task(model_type, vocab_size=300), text_of(tmp_path)
    callbacks = [SavePretrained(str(tmp_path / "final"))]
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=callbacks).fit(task, data)
    model = CausalLM.auto_class.from_pretrained(tmp_path / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert tokenizer.eos_token == "<|endoftext|>"
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id == data.tokenizer.eos_token_id
        assert config.bos_token_id is None
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    # Where the end is what follows everything, a text ends there.
    torch.nn.init.zeros_(model.lm_head.weight)
    assert tokenizer.eos_token_id == 0
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).tolist() == [[5, 6, 7, 0]]


@pytest.mark.parametrize(("model_type", "is_moved"), [("bert", True), ("roberta", False)])
def test_only_the_row_of_the_padding_is_not_trained(model_type, is_moved, tmp_path):
    """BERT's first row is its padding's, and with the tokenizer of the data that of the end of a text."""
    shape = {**BERT, "max_position_embeddings": 18}
    task = MaskedLM(model_type, overrides=shape, vocab_size=300)
    data = text_of(tmp_path, objective="masked")
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(task, data)
    embedding, pad = task.model.get_input_embeddings(), data.tokenizer.pad_token_id
    assert embedding.padding_idx == task.model.config.pad_token_id == (pad if is_moved else 1)
    assert data.tokenizer.eos_token_id == 0
    task.model.zero_grad()
    ids = torch.arange(8)[None]
    task.model.base_model(input_ids=ids).last_hidden_state.square().mean().backward()
    has_gradient = embedding.weight.grad[:8].abs().sum(-1) > 0
    assert [row for row, trained in enumerate(has_gradient.tolist()) if not trained] == [embedding.padding_idx]
    # Of another size it is the same row.
    small = coalesce(task.model, level_map(anatomy_of(task.model)))
    assert small.get_input_embeddings().padding_idx == embedding.padding_idx


def test_special_tokens_that_somebody_chose_stay(tmp_path):
    task = make_task(overrides={**GPT2, "eos_token_id": 7}, vocab_size=300)
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(task, text_of(tmp_path))
    assert task.model.config.eos_token_id == task.model.generation_config.eos_token_id == 7


def test_trained_models_keep_their_special_tokens(tmp_path):
    folder = str(tmp_path / "pretrained")
    make_task(overrides={**GPT2, "eos_token_id": 7}, vocab_size=300).model.save_pretrained(folder)
    for pretrained, expected in ((True, 7), (False, 0)):
        task = CausalLM(folder, pretrained=pretrained, vocab_size=300)
        make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(task, text_of(tmp_path))
        assert task.model.generation_config.eos_token_id == expected


def test_two_vocabulary_sizes_are_one_too_many():
    with pytest.raises(ValueError, match="overrides"):
        make_task(overrides={**GPT2, "vocab_size": VOCAB_SIZE + 1})
    assert make_task(overrides={**GPT2, "vocab_size": 7}, vocab_size=None).model.config.vocab_size == 7


def test_a_folder_gives_weights_in_training_mode(pretrained):
    original = make_task().model
    model = CausalLM(pretrained, vocab_size=VOCAB_SIZE, overrides={"resid_pdrop": 0.0}).model
    assert model.training
    assert model.config.resid_pdrop == 0
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), model.parameters(), strict=True))


def test_a_folder_may_give_its_shape_alone(pretrained):
    seed_everything(2, verbose=False)
    model = CausalLM(pretrained, pretrained=False, vocab_size=7).model
    assert model.get_input_embeddings().weight.shape == (7, 16)
    assert model.get_input_embeddings().weight.std() > 0


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE + 1, VOCAB_SIZE // 2])
def test_pretrained_weights_belong_to_their_vocabulary(pretrained, vocab_size):
    with pytest.raises(ValueError, match="tokenizer"):
        CausalLM(pretrained, vocab_size=vocab_size)


def test_rows_that_pad_the_embeddings_are_no_other_vocabulary(pretrained):
    assert CausalLM(pretrained, vocab_size=VOCAB_SIZE - 1).model.config.vocab_size == VOCAB_SIZE


def test_a_misspelt_model_type_is_told_from_a_missing_one(monkeypatch):
    def offline(name, **_):
        raise OSError("no such model")

    monkeypatch.setattr("lit_accel.tasks.hugging_face.AutoConfig.from_pretrained", offline)
    with pytest.raises(ValueError, match="'gpt2'"):
        CausalLM("gtp2")


def test_blocks_are_compiled_only_when_asked(monkeypatch):
    compiled = []
    monkeypatch.setattr("lit_accel.anatomy.compile_blocks", compiled.append)
    make_task().configure_model()
    assert not compiled
    task = make_task(compile_blocks=True)
    task.configure_model()
    assert compiled == [task.model]


def test_save_pretrained_writes_an_ordinary_folder(tmp_path):
    class WithTokenizer(Batches):
        def save_tokenizer(self, folder):
            (tmp_path / "final" / "tokenizer.json").write_text(folder)

    task, folder = make_task(), str(tmp_path / "final")
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[SavePretrained(folder)])
    trainer.fit(task, WithTokenizer())
    again = CausalLM(folder, vocab_size=VOCAB_SIZE)
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), again.parameters(), strict=True))
    assert (tmp_path / "final" / "tokenizer.json").read_text() == folder


def test_save_pretrained_leaves_a_trial_run_alone(tmp_path):
    trainer = make_trainer(tmp_path, fast_dev_run=True, callbacks=[SavePretrained(str(tmp_path / "final"))])
    trainer.fit(make_task(), Batches())
    assert not (tmp_path / "final").exists()


ENCODER = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize("model", ["bert", "roberta"])
def test_an_encoder_that_sees_the_answer_is_refused(model):
    with pytest.raises(ValueError, match="is an encoder, in which every position sees those after it"):
        CausalLM(model, overrides=ENCODER, vocab_size=32)


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("bert", {**ENCODER, "is_decoder": True}),
        # Says that it is no decoder, and is nothing else.
        ("gpt_neox", ENCODER),
        # Its own class of decoders is asked for.
        ("bart", {"decoder_layers": 1, "d_model": 16, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}),
    ],
)
def test_decoders_of_all_kinds_see_no_answer(model, overrides):
    task = CausalLM(model, overrides=overrides, vocab_size=32).eval()
    ids = torch.randint(3, 32, (2, 8))
    with torch.no_grad():
        before = task(ids)
        ids[:, 5] = (ids[:, 5] - 2) % 29 + 3
        after = task(ids)
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert not torch.allclose(after[:, 5:], before[:, 5:])
