"""Parts of packed layers that can be placed, and those that cannot."""

import re
from typing import Any

import pytest

from rotq.errors import RotqError
from rotq.vllm.shards import check_shards

WHOLE: dict[str, Any] = {
    "rows": [256],
    "columns": 256,
    "all_columns": 256,
    "group_size": 64,
    "has_zeros": True,
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rows": [256, 128, 128]},
        {"columns": 128},
        {"rows": [33]},
        {"rows": [33, 7], "has_zeros": False},
        {"columns": 32, "group_size": 32},
        {"columns": 32, "group_size": -1},
    ],
)
def test_parts_that_fit(change: dict[str, Any]) -> None:
    check_shards("layer", 3, **{**WHOLE, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": 40, "group_size": 8}, "layer: 40 columns of 3 bits on each rank"),
        ({"columns": 96}, "layer: groups of 64 do not divide the 96 columns of a rank"),
        ({"rows": [64, 48]}, "48 zero points of 3 bits are no whole words"),
    ],
)
def test_parts_that_do_not(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RotqError, match=re.escape(message)):
        check_shards("layer", 3, **{**WHOLE, **change})
