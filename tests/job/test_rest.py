"""What stays dense, in the dtypes that it is computed and stored in."""

import torch
from torch import nn

from rotq.job.rest import module_in, rest_in


def test_a_module_in_another_dtype_keeps_global_scales_and_integers() -> None:
    inner = nn.Linear(3, 2)
    inner.register_buffer("input_global_scale", torch.tensor([1.0 + 2**-20]))
    inner.register_buffer("input_signs", torch.ones(3, dtype=torch.int8))
    outer = nn.Sequential(nn.Sequential(inner))
    made = module_in(outer, torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in made.state_dict().items()}
    assert dtypes == {
        "0.0.weight": torch.bfloat16,
        "0.0.bias": torch.bfloat16,
        "0.0.input_global_scale": torch.float32,
        "0.0.input_signs": torch.int8,
    }
    assert made.state_dict()["0.0.input_global_scale"] == 1.0 + 2**-20
    assert inner.weight.dtype == torch.float32


def test_vectors_of_one_dtype_follow_it_and_others_stay() -> None:
    tensors = {
        "a.weight": torch.ones(2, 2),
        "norm.weight": torch.ones(2),
        "half.bias": torch.ones(2, dtype=torch.float16),
        "a.input_global_scale": torch.ones(1),
        "ids": torch.ones(2, dtype=torch.int64),
    }
    found = rest_in(tensors, torch.float16, {torch.float32: torch.bfloat16})
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "a.weight": torch.float16,
        "norm.weight": torch.bfloat16,
        "half.bias": torch.float16,
        "a.input_global_scale": torch.float32,
        "ids": torch.int64,
    }
