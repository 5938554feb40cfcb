"""Sets to train: offsets that follow their scales, and unquantized parameters beside them."""

import copy

import pytest
import torch
from tiny import Tiny

from qzo import QZO, quantize, scales, trainable
from qzo.errors import QzoError


def pairs(dtype=torch.float32):
    """Scales and offsets of several chunks with unlike numbers, a scale of 0, an offset of 0."""
    scale = torch.rand(40, 30) * 0.02 + 0.001
    offset = torch.randn(40, 30) * 0.1
    scale[0, 0], offset[0, 1] = 0.0, 0.0
    return scale.to(dtype), offset.to(dtype)


def groups(scale, offset):
    return [{"params": {"s": scale}, "offsets": {"s": offset}}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("relative", [False, True])
def test_scale_and_offset_move_by_the_same_relative_amount(dtype, relative):
    scale, offset = pairs(dtype)
    s0, m0 = scale.float().clone(), offset.float().clone()
    seen = []
    optimizer = QZO(groups(scale, offset), lr=1e-4, eps=1e-3 if not relative else 0.1, relative=relative)

    def closure():
        seen.append((scale.clone(), offset.clone()))
        return (scale.float() ** 2).sum() * 100

    optimizer.step(closure)
    z = optimizer.direction()
    assert list(z) == ["s"]
    s1 = s0 + (0.1 * s0 if relative else 1e-3) * z["s"]
    for _ in range(2):
        optimizer.step(closure)
    expected = torch.where(s0 == 0, m0, m0 * (s1 / s0))
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(seen[0][1].float(), expected, rtol=tolerance, atol=1e-6)
    master = optimizer.state[scale]["master"]
    assert not torch.equal(master, s0)
    torch.testing.assert_close(offset.float(), torch.where(s0 == 0, m0, m0 * (master / s0)), rtol=tolerance, atol=1e-6)
    assert offset[0, 0] == m0[0, 0] and offset[0, 1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_undone_step_gives_scales_and_offsets_back_to_the_bit(dtype):
    scale, offset = pairs(dtype)
    start = scale.clone(), offset.clone()
    optimizer = QZO(groups(scale, offset), lr=1.0)
    optimizer.step(lambda: float("nan"))
    assert torch.equal(scale, start[0]) and torch.equal(offset, start[1])
    optimizer.step(lambda: 1.0)  # d = 0
    assert torch.equal(scale, start[0]) and torch.equal(offset, start[1])


def test_an_offset_follows_a_scale_down_to_zero_and_back():
    scale, offset = torch.tensor([0.5, 0.5]), torch.tensor([0.25, -1.0])
    optimizer = QZO(groups(scale, offset), lr=1.0, clip_threshold=None)
    optimizer.set_truth({**optimizer.truth(), "0.master": torch.tensor([0.0, 1.0])})
    assert offset.tolist() == [0.0, -2.0]
    optimizer.set_truth({**optimizer.truth(), "0.master": torch.tensor([1.0, 0.5])})
    assert offset.tolist() == [0.5, -1.0]


def test_the_weights_of_an_offset_layer_scale_as_a_whole():
    model = Tiny(offset=True)
    before = model.first(torch.eye(64)).T
    optimizer = QZO(trainable(model, "scales+offsets"))
    truth = optimizer.truth()
    optimizer.set_truth({**truth, "0.master": truth["0.master"] * 1.5})
    torch.testing.assert_close(model.first(torch.eye(64)).T, before * 1.5)


def test_offset_format_and_zero_points_train_alike():
    plain, offset = Tiny(), Tiny(offset=True)
    torch.testing.assert_close(plain.loss(), offset.loss())
    optimizers = [QZO(trainable(model, "scales+offsets"), lr=1e-4) for model in (plain, offset)]
    for step in range(10):
        for model, optimizer in zip((plain, offset), optimizers, strict=True):
            optimizer.step(lambda model=model: model.loss(step))  # noqa: B023
    torch.testing.assert_close(scales(plain), scales(offset), rtol=1e-3, atol=1e-5)
    alone = Tiny(offset=True)
    still = alone.first.offsets.clone()
    QZO(trainable(alone, follow=False), lr=1e-4).step(alone.loss)
    assert torch.equal(alone.first.offsets, still)


WAYS = {
    "as the README does": scales,
    "pairs": lambda model: scales(model).items(),
    "without names": lambda model: list(scales(model).values()),
    "some of them": lambda model: {name: scale for name, scale in scales(model).items() if "first" in name},
    "of a group": lambda model: [{"params": list(scales(model).values()), "lr": 1e-4}],
    "a set": trainable,
}


@pytest.mark.parametrize("way", WAYS)
def test_offsets_follow_however_the_scales_are_given(way):
    model, wanted = Tiny(offset=True), Tiny(offset=True)
    optimizers = [QZO(WAYS[way](model), lr=1e-4), QZO(trainable(wanted, "scales+offsets"), lr=1e-4)]
    optimizers[1].step(wanted.loss)
    optimizers[0].step(model.loss)
    assert not torch.equal(model.first.offsets, Tiny(offset=True).first.offsets)
    torch.testing.assert_close(
        model.first.offsets / model.first.scales, Tiny(offset=True).first.offsets / Tiny(offset=True).first.scales
    )
    if way != "some of them":
        assert torch.equal(model.first.offsets, wanted.first.offsets)
        assert torch.equal(model.second.offsets, wanted.second.offsets)


def test_offsets_that_a_group_names_are_all_of_it_and_none_can_be():
    model = Tiny(offset=True)
    own = scales(model)
    assert not QZO([{"params": own, "offsets": {}}])._offsets and len(QZO(own)._offsets) == 2
    one = QZO([{"params": own, "offsets": {"first.scales": model.first.offsets}}])
    assert list(one._offsets.values()) == [model.first.offsets]
    assert not QZO(scales(Tiny()))._offsets
    with pytest.raises(QzoError, match=r"follow=False does not; choose one"):
        trainable(model, "scales+offsets", follow=False)


def test_the_copy_of_a_model_moves_its_own_offsets():
    model = Tiny(offset=True)
    scales(model)
    twin = copy.deepcopy(model)
    before = model.first.offsets.clone()
    QZO(list(scales(twin).values()), lr=1e-3).step(twin.loss)
    assert torch.equal(model.first.offsets, before) and not torch.equal(twin.first.offsets, before)
    twin.load_state_dict({name: tensor.clone() for name, tensor in twin.state_dict().items()}, assign=True)
    assert QZO(scales(twin))._offsets[twin.first.scales] is twin.first.offsets


def test_a_state_from_when_offsets_stayed_names_what_goes_on_with_it():
    model = Tiny(offset=True)
    old = QZO(trainable(model, follow=False)).state_dict()
    with pytest.raises(QzoError, match=r"without an offset, .* qzo\.trainable\(model, follow=False\)"):
        QZO(scales(model)).load_state_dict(old)
    QZO(trainable(model, follow=False)).load_state_dict(old)


def test_resume_and_copies_keep_what_offsets_start_from(tmp_path):
    model, twin = Tiny(torch.float16, offset=True), Tiny(torch.float16, offset=True)
    optimizer = QZO(trainable(model, "scales+offsets"), lr=1e-3)
    for step in range(3):
        optimizer.step(lambda: model.loss(step))  # noqa: B023
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = QZO(trainable(twin, "scales+offsets"), lr=1e-3)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(twin.first.offsets, model.first.offsets)
    optimizer.step(model.loss)
    other.step(twin.loss)
    assert torch.equal(twin.second.offsets, model.second.offsets)
    with pytest.raises(QzoError, match="saved with an offset"):
        QZO(trainable(twin, follow=False)).load_state_dict(torch.load(tmp_path / "state.pt"))
    copied = copy.deepcopy(other)
    assert len(copied._offsets) == 2 and all(t in copied.state for t in copied._offsets)


def test_unquantized_parameters_come_after_the_scales_in_the_same_stream(make_model, input_ids):
    model = quantize(make_model("opt"), 4, 32)
    sets = trainable(model, "scales+unquantized")
    alone = QZO(scales(model))
    optimizer = QZO(sets, lr=1e-2)
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer.step(lambda: model(input_ids, labels=input_ids).loss)
    names = [*scales(model), *start]
    assert list(optimizer.direction()) == names and "model.decoder.layers.0.fc1.bias" in names
    alone.steps = 1
    z = alone.direction()
    assert all(torch.equal(optimizer.direction()[name], z[name]) for name in z)
    for name, parameter in model.named_parameters():
        d = optimizer.last.applied[1][0]
        torch.testing.assert_close(parameter, start[name] - 1e-2 * d * optimizer.direction()[name])
    assert min(float(parameter.min()) for parameter in model.parameters()) < 0


def test_sets_that_do_not_exist_are_refused():
    for what in ("", "offsets", "scales+codes", "scales+scales"):
        with pytest.raises(QzoError, match="is not known"):
            trainable(Tiny(), what)
    with pytest.raises(QzoError, match=r"call qzo\.quantize"):
        trainable(torch.nn.Linear(2, 2))


def test_offsets_that_fit_no_scale_are_refused():
    scale, offset = pairs()
    for bad, message in (
        ({"t": offset}, "belongs to no scale"),
        ({"s": offset[:3]}, "must be the same"),
        ({"s": offset.to(torch.int32)}, "dtype torch.int32"),
    ):
        with pytest.raises(QzoError, match=message):
            QZO([{"params": {"s": scale}, "offsets": bad}])
