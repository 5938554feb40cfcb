"""Constants are made once, but never carried out of the mode they were made in."""

import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from qzo.kernels.constants import constant


def test_a_constant_is_made_once_for_each_dtype():
    words, small = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.uint8)
    made = constant((0, 4), words)
    assert made.tolist() == [0, 4] and made.dtype == torch.int32 and constant((0, 4), words) is made
    assert constant((0, 4), small).dtype == torch.uint8


def test_constants_beside_fake_and_meta_tensors_are_of_their_kind():
    with FakeTensorMode():
        fake = constant((0, 8, 16), torch.zeros(2, dtype=torch.int32))
        assert isinstance(fake, FakeTensor)
    real = constant((0, 8, 16), torch.zeros(2, dtype=torch.int32))
    assert type(real) is torch.Tensor and constant((0, 8), torch.zeros(2, device="meta")).is_meta


def test_a_constant_made_under_inference_mode_can_be_used_in_training():
    with torch.inference_mode():
        constant((3, 5), torch.zeros(1))
    kept = constant((3, 5), torch.zeros(1))
    (torch.ones(2, requires_grad=True) * kept).sum().backward()
