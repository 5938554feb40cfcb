"""Optimizers of the Trainer: each is made or refused in one line; low-rank, low-bit and offloaded states."""

from importlib.util import find_spec

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers.training_args import OptimizerNames

from bench.cases.recipes.recipe import Recipe
from bench.ledger.ledger import Ledger
from bench.methods.optimizers.galore import basis
from bench.methods.optimizers.low_bit_states import moment_of
from bench.methods.optimizers.made import optimizer_of
from bench.methods.steps import RecipeStep
from qzo.errors import QzoError

GALORE = {"optim": "galore_adamw", "optim_target_modules": "all-linear", "optim_args": "rank=4"}


def model(device="meta"):
    torch.manual_seed(0)
    layers = {"table": torch.nn.Embedding(100, 50), "tall": torch.nn.Linear(40, 160), "wide": torch.nn.Linear(200, 50)}
    return torch.nn.ModuleDict(layers).to(device)


def states(optimizer):
    """Numbers of each state, by the shape of its parameter."""
    return {
        tuple(parameter.shape): sorted(item.numel() for item in state.values() if isinstance(item, torch.Tensor))
        for parameter, state in optimizer.state.items()
    }


def peak(layers, recipe):
    """Bytes at the most while gradients of ones are stepped with twice, and the optimizer."""
    device = next(layers.parameters()).device.type
    ledger = Ledger(device)
    ledger.assign("weights", layers.parameters())
    with ledger:
        optimizer = optimizer_of(recipe, layers)
        for _ in range(2):
            sum(parameter.sum() for parameter in layers.parameters()).backward()
            optimizer.step()
            layers.zero_grad()
    return ledger.peak_bytes(), optimizer


def test_every_optimizer_of_the_trainer_is_made_or_refused_in_one_line():
    made = []
    for name in OptimizerNames:
        try:
            made.append(
                (name.value, optimizer_of(Recipe("any", GALORE | {"optim": name.value, "optim_args": None}), model()))
            )
        except QzoError as error:
            assert "\n" not in str(error) and name.value in str(error)
    needed = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "galore_adamw", "galore_adamw_layerwise"}
    for package, names in (
        ("torchao", "adamw_torch_8bit adamw_torch_4bit"),
        ("bitsandbytes", "paged_adamw_32bit lion_8bit"),
    ):
        needed |= set(names.split()) if find_spec(package) else set()
    assert needed <= {name for name, _ in made}
    for wrong in ({"optim": "adam"}, {"optim": "rmsprop_bnb", "optim_args": "colour=red"}):
        with pytest.raises(QzoError, match=f"optim='{wrong['optim']}' cannot be simulated here"):
            optimizer_of(Recipe("any", wrong), model())


def test_galore_keeps_moments_of_a_low_rank_and_its_basis():
    on_cpu, optimizer = peak(model("cpu"), Recipe("any", GALORE))
    assert states(optimizer)[160, 40] == [4 * 40, 160 * 4, 160 * 4]
    assert states(optimizer)[50, 200] == [4 * 50, 4 * 200, 4 * 200]
    assert states(optimizer)[100, 50] == [100 * 50] * 2  # no linear layer
    assert on_cpu == peak(model(), Recipe("any", GALORE))[0]
    assert basis(torch.randn(8, 5).bfloat16(), 2).dtype is torch.bfloat16


def test_layerwise_galore_steps_within_backward():
    layers = model("cpu")
    before = layers["tall"].weight.clone()
    optimizer_of(Recipe("any", GALORE | {"optim": "galore_adamw_layerwise"}), layers)
    (layers["tall"].weight * torch.randn(160, 40)).sum().backward()
    assert layers["tall"].weight.grad is None and not torch.equal(layers["tall"].weight, before)


def test_galore_without_layers_is_refused():
    for changes, says in (
        ({"optim_target_modules": None}, "needs optim_target_modules"),
        ({"optim_target_modules": ["none"]}, "matches no linear layer"),
        ({"optim_args": "rank=4,proj_type=full"}, "proj_type=full is not simulated"),
        ({"optim_args": "rank=many"}, "no number where one belongs"),
        ({"optim": "galore_adamw_layerwise", "gradient_accumulation_steps": 2}, "does not accumulate"),
    ):
        with pytest.raises(QzoError, match=says):
            optimizer_of(Recipe("any", GALORE | changes), model())


@pytest.mark.parametrize("n_bits, name", [(8, "AdamW8bit"), (4, "AdamW4bit")])
def test_low_bit_moments_are_those_of_torchao(n_bits, name):
    optim = pytest.importorskip("torchao.optim")
    for shape in ((64, 256), (63, 65), (8, 8)):
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
        theirs = getattr(optim, name)([parameter])._new_buffer(parameter, True)
        parts = [getattr(theirs, part) for part in getattr(theirs, "tensor_attrs", ())] or [theirs]
        assert sum(part.nbytes for part in parts) == sum(part.nbytes for part in moment_of(parameter, n_bits).values())


def test_a_compiled_step_is_refused_on_a_simulated_cpu():
    pytest.importorskip("torchao.optim")
    with FakeTensorMode():
        parameter = torch.nn.Parameter(torch.zeros(64, 64))
    layers = torch.nn.ParameterDict({"fake": parameter})
    with pytest.raises(QzoError, match="compiles its step"):
        optimizer_of(Recipe("any", {"optim": "adamw_torch_8bit"}), layers)


def test_states_and_gradients_wait_in_the_hosts_memory():
    whole, _ = peak(model(), Recipe("any", {"optim": "adamw_torch"}))
    less, optimizer = peak(model(), Recipe("any", optimizer_offload="states"))
    least, _ = peak(model(), Recipe("any", optimizer_offload="gradients"))
    assert least < less < whole
    assert not optimizer.state and optimizer.on_device is not None
    layers = model()
    optimizer_of(Recipe("any", optimizer_offload="gradients"), layers)
    sum(parameter.sum() for parameter in layers.parameters()).backward()
    assert layers["tall"].weight.grad is None and layers["tall"].bias.grad is not None
    RecipeStep(torch.nn.ModuleDict({"tall": torch.nn.Linear(80, 80, device="meta")}), optimizer, None)._clip()


@pytest.mark.parametrize(
    "recipe, says",
    [
        (Recipe("any", optimizer_offload="all"), "choose states or gradients"),
        (Recipe("any", {"optim": "sgd"}, optimizer_offload="states"), "simulated with adamw_torch"),
        (Recipe("any", {"gradient_accumulation_steps": 2}, optimizer_offload="gradients"), "cannot be accumulated"),
    ],
)
def test_what_cannot_be_offloaded_is_told(recipe, says):
    with pytest.raises(QzoError, match=says):
        optimizer_of(recipe, model())
    with pytest.raises(QzoError, match="nowhere to offload to"):
        optimizer_of(Recipe("any", optimizer_offload="states"), model("cpu"))
