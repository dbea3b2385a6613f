"""How kernels are launched: on the device of their tensors, with the fusion of products said."""

from typing import Any

import pytest
import torch

from rotq_kernels.launching import Known, launch


class Recorder:
    """A kernel that notes what it was given, and the device that was current."""

    arg_names = ("x", "a", "N")

    def __init__(self, compiled: Any = None) -> None:
        self.compiled = compiled
        self.current: list[Any] = []
        self.calls: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            self.calls.append((grid, arguments, named, list(self.current)))
            return self.compiled

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


def test_a_kernel_that_is_known_is_launched_at_once() -> None:
    compiled = Recorder()
    kernel, known = Recorder(compiled), Known()
    for number in (1, 2, 3):
        launch(
            kernel, (number, 1, 1), number, "a", on=torch.zeros(1), known=known, N=5, num_warps=4
        )
    assert [call[1] for call in kernel.calls] == [(1, "a")]
    # constants are arguments of what is compiled
    assert [call[:3] for call in compiled.calls] == [
        ((2, 1, 1), (2, "a", 5), {}),
        ((3, 1, 1), (3, "a", 5), {}),
    ]


def test_the_interpreter_makes_nothing_known() -> None:
    kernel, known = Recorder(), Known()
    launch(kernel, (1, 1, 1), 1, "a", on=torch.zeros(1), known=known, N=5)
    assert not known
