"""How kernels are launched: on the device of their tensors, with the fusion of products said."""

from typing import Any

import pytest
import torch

from rotq_kernels.launching import launch


class Recorder:
    """A kernel that notes what it was given, and the device that was current."""

    def __init__(self) -> None:
        self.current: list[Any] = []
        self.calls: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **named: Any) -> None:
            self.calls.append((grid, arguments, named, list(self.current)))

        return run


@pytest.mark.parametrize("given", [{}, {"enable_fp_fusion": False}], ids=["fused", "not fused"])
def test_launch(given: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, tensor = Recorder(), torch.zeros(1)

    class Guard:
        def __init__(self, on: torch.Tensor) -> None:
            self.on = on

        def __enter__(self) -> None:
            kernel.current.append(self.on)

        def __exit__(self, *_: object) -> None:
            kernel.current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    launch(kernel, (3, 2), 1, "a", on=tensor, N=5, **given)
    ((grid, arguments, named, current),) = kernel.calls
    assert (grid, arguments, named) == ((3, 2), (1, "a"), {"enable_fp_fusion": not given, "N": 5})
    assert current[0] is tensor
    assert not kernel.current
