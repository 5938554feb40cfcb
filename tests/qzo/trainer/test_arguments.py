"""Every field of TrainingArguments is honoured, makes no difference, or is told."""

import dataclasses
import warnings

import pytest
import torch
from transformers import TrainingArguments

from qzo import QZO, QzoError, QZOTrainer, quantize, scales
from qzo.trainer.arguments import HONOURED, IRRELEVANT, OFF, REFUSED, WARNED, check_arguments

TABLES = {"honoured": HONOURED, "irrelevant": IRRELEVANT, "refused": set(REFUSED), "warned": set(WARNED)}
ASKED = {
    "weight_decay": 0.5,
    "optim": "sgd",
    "optim_args": "a=1",
    "optim_target_modules": ["q_proj"],
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-6,
    "neftune_noise_alpha": 5.0,
    "fp16": True,
    "fp16_full_eval": True,
    "bf16_full_eval": True,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "auto_find_batch_size": True,
    "enable_jit_checkpoint": True,
    "deepspeed": {"zero_optimization": {"stage": 1}},
    "fsdp": True,
    "fsdp_config": {"version": 2},
    "parallelism_config": object(),
    "max_grad_norm": 0.3,
    "bf16": True,
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


def plain(**options):
    return TrainingArguments("out", report_to=[], use_cpu=True, **options)


def with_value(name, value):
    """As if it was asked for, whatever a library or a device of this machine would say to it."""
    arguments = plain()
    object.__setattr__(arguments, name, value)
    if name == "fsdp_config":
        object.__setattr__(arguments, "fsdp", True)
    return arguments


@pytest.mark.parametrize("field", dataclasses.fields(TrainingArguments), ids=lambda field: field.name)
def test_each_field_is_in_exactly_one_table(field):
    places = [table for table, names in TABLES.items() if field.name in names]
    assert len(places) == 1, f"{field.name}: {places}; see what transformers makes of it and put it into one table"


def test_defaults_are_neither_refused_nor_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_arguments(plain())
    assert ASKED.keys() == {**REFUSED, **WARNED}.keys() and set(OFF) <= set(ASKED)


FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize("name", sorted(FIELDS & REFUSED.keys()))
def test_what_would_give_another_result_is_refused_with_reason_and_remedy(name):
    with pytest.raises(
        QzoError, match=f"^{'fsdp' if name == 'fsdp_config' else name}=.*: .*|^fp16=True scales"
    ) as told:
        check_arguments(with_value(name, ASKED[name]))
    assert "\n" not in str(told.value) and len(str(told.value)) < 250


@pytest.mark.parametrize("name", sorted(FIELDS & WARNED.keys()))
def test_what_makes_no_difference_is_told_once(name):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        check_arguments(with_value(name, ASKED[name]))
    assert [str(warning.message).partition("=")[0] for warning in told] == [name]


def test_a_field_of_a_later_version_is_left_alone():
    @dataclasses.dataclass
    class Later(TrainingArguments):
        brand_new: float = 1.0

    check_arguments(Later("out", report_to=[], use_cpu=True, brand_new=2.0))


def test_what_a_child_declares_or_fills_in_by_itself_was_not_asked_for():
    @dataclasses.dataclass
    class Child(TrainingArguments):
        gradient_checkpointing: bool = True
        bf16: bool | None = None

        def __post_init__(self):
            self.bf16 = True if self.bf16 is None else self.bf16

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_arguments(Child("out"))
    with pytest.raises(QzoError, match=r"weight_decay=0\.1"):
        check_arguments(Child("out", weight_decay=0.1))


def test_the_trainer_asks_before_it_does_anything(make_model, tmp_path):
    model = quantize(make_model(), 4, 32)
    arguments = TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True, weight_decay=0.5)
    with pytest.raises(QzoError, match=r"weight_decay=0\.5 cannot be honoured: scales that decay"):
        QZOTrainer(model, arguments)
    with pytest.raises(QzoError, match=r"qzo_options=\{'eps': 0\.01\} beside an optimizer"):
        QZOTrainer(model, plain(), optimizers=(QZO(scales(model)), None), qzo_options={"eps": 0.01})
    with pytest.raises(QzoError, match="optimizer_cls_and_kwargs is for gradients"):
        QZOTrainer(model, plain(), optimizer_cls_and_kwargs=(torch.optim.SGD, {}))
    assert not (tmp_path / "out").exists()


def test_autocast_that_a_float16_model_cannot_follow_is_refused_before_it_begins(make_model):
    arguments = TrainingArguments("out", report_to=[], use_cpu=True, bf16=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(QzoError, match=r"bf16=True: autocast on a CPU .* float16 .*; leave it out, or load"):
            QZOTrainer(quantize(make_model(dtype=torch.float16), 4, 32), arguments)
        QZOTrainer(quantize(make_model(dtype=torch.bfloat16), 4, 32), arguments)
