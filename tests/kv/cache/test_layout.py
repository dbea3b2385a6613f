"""A layout on another device: the same kind, made once."""

import torch

from rotq.kv.pool.pool import Row, lay_out


def test_other_device() -> None:
    layout = lay_out([Row(pages=[0], sink=1, fresh=3)], 3, sinks=2, table_width=1)
    assert layout.to(torch.device("cpu")) is layout
    moved = layout.to(torch.device("meta"))
    assert layout.to(torch.device("meta")) is moved
    assert type(moved) is type(layout)
    tensors = {name: value for name, value in vars(layout).items() if torch.is_tensor(value)}
    assert len(tensors) == 9
    for name, tensor in tensors.items():
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == tensor.shape
