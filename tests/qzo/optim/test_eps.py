"""An eps that is larger than the scales is refused, before the first step alone; the paper's own is not."""

import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode

from qzo import QZO, quantize, scales
from qzo.errors import QzoError
from qzo.optim.guards.eps import check_eps


def loss():
    return 1.0


@pytest.mark.parametrize("size", [0.02, 0.006])  # of weights: as in 1B models, and the smallest of OPT and Falcon
@pytest.mark.parametrize("n_bits", [2, 3, 4])
def test_the_papers_eps_suits_few_bits_whatever_the_size_of_weights(make_model, n_bits, size):
    model = make_model()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=size)
    QZO(scales(quantize(model, n_bits, 32))).step(loss)


def test_the_scales_of_whole_rows_in_eight_bits_need_relative_amounts(make_model):
    model = quantize(make_model(), 8, -1)
    with pytest.raises(
        QzoError, match=r"larger than the scales of 14 of 14 tensors.*relative=True with eps=1e-2"
    ) as error:
        QZO(scales(model)).step(loss)
    QZO(scales(model), relative=True, eps=1e-2).step(loss)
    QZO(scales(model), eps=float(str(error.value).rpartition("eps=")[2])).step(loss)


def test_a_run_that_was_begun_goes_on(make_model):
    live = scales(quantize(make_model(), 8, -1))
    optimizer = QZO(live)
    optimizer.replay(((1.0,),))
    optimizer.step(loss)


def test_what_counts_is_more_than_a_dead_layer_and_less_than_all():
    large, small = torch.full((1000,), 0.1), torch.full((9,), 1e-5)
    check_eps([("a", large), ("dead", small)], 1e-3, False)
    with pytest.raises(QzoError, match=r"scales of 1 of 2 tensors, e.g. head with a median of 1.0e-05"):
        check_eps([("a", large), ("head", small.expand(3, 9).reshape(-1))], 1e-3, False)
    with pytest.raises(QzoError, match=r"e.g. signed with"):
        check_eps([("signed", torch.tensor([-1e-4, 1e-4, 0.0]))], 1e-3, False)


def test_tensors_without_numbers_tell_nothing():
    with FakeTensorMode():
        fake = torch.empty(8)
    for tensor in (torch.zeros(8), torch.empty(0), torch.empty(8, device="meta"), fake):
        check_eps([("a", tensor)], 1e-3, False)


def test_groups_that_are_no_scales_may_be_small(make_model):
    bias = torch.full((8,), 1e-6)
    QZO([{"params": {"bias": bias}, "nonnegative": False}]).step(loss)
    with pytest.raises(QzoError, match="larger than the scales"):
        QZO([{"params": {"a.scales": bias}, "nonnegative": False}]).step(loss)
    with pytest.raises(QzoError, match="eps=2 is more than each number itself"):
        QZO([bias], relative=True, eps=2.0).step(loss)


def test_an_eps_that_is_smaller_and_yet_wrecks_the_model_is_told_with_what_suits_it():
    large = torch.full((1000,), 5e-3)  # as torchao int8 of SmolLM2-135M, whose loss goes from 2.4 to 6.3
    with pytest.warns(UserWarning, match=r"eps=0\.001 is 20% of the scales.*relative=True.*or give eps=2e-04") as told:
        check_eps([("a", large)], 1e-3, False)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_eps([("a", large)], float(str(told[0].message).rpartition("eps=")[2]), False)
        check_eps([("a", large), ("dead", torch.full((9,), 1e-3))], 7e-4, False)
        check_eps([("a", large)], 1e-2, True)
