"""The model card: README.md of a quantized checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from rotq.checkpoint.hub import HubModel
from rotq.report.lines import runtime_line

TEMPLATE = """\
---
{front}---

# {title}

Quantized with rotq{origin}.
`rotq_recipe.yaml` is the resolved recipe and `rotq_provenance.json` says
what it was run on; `rotq quantize` with that recipe repeats the job.

{grids}
{runtime}
## Loading

{loading}
"""

COMPRESSED_TENSORS = """\
The weights are stored as compressed-tensors (`{stored}`) and load without rotq:

```python
from transformers import {auto}

model = {auto}.from_pretrained("PATH")  # pip install "compressed-tensors>=0.18"
```

transformers makes the weights dense while loading or at the first
forward pass, and may save them so; `rotq.load("PATH")` keeps them packed, and its `save_pretrained`
writes them as they are here."""

NOT_TRANSFORMERS = """\
The weights are stored as compressed-tensors (`{stored}`). transformers 5.23 with
compressed-tensors 0.20 does not load them:
{obstacle}.
rotq does, and keeps them packed:

```python
import rotq

model = rotq.load("PATH")
```"""

ROTQ = """\
The weights are stored in the rotq format. transformers reads it where rotq is installed, with this
head, another one or none. Without rotq it does not know the format, and would only warn and load a
model with random weights.

```python
import rotq
from transformers import {auto}

model = {auto}.from_pretrained("PATH")
```"""


TILES = "- linear layers of the blocks: {bits} bits, tiles of 16 x 16 on a trellis of 2^16 states"

EXL3 = """\
The weights are stored in EXL3. exllamav3 runs them on CUDA devices, GPTQModel 7 there and on CPUs;
transformers reads them where rotq is installed, and makes them dense while loading:

```python
import rotq
from transformers import {auto}

model = {auto}.from_pretrained("PATH")
```"""


def model_card(
    config: Mapping[str, Any],
    quantization: dict[str, Any],
    base_model: HubModel | None,
    *,
    auto: str,
    obstacle: str | None,
) -> str:
    """Markdown with the hub's front matter.

    Args:
        config: The source's config.json.
        quantization: From ``quantization_config``.
        base_model: The source; None where it is not one of the hub.
        auto: Name of transformers' auto class.
        obstacle: Why transformers alone cannot load it; None where it can.
    """
    method = quantization["quant_method"]
    groups = list(quantization.get("config_groups", {}).values())
    bits = sorted({group["weights"]["num_bits"] for group in groups} or {quantization["bits"]})
    front: dict[str, Any] = {"library_name": "transformers"}
    if base_model is not None:
        front |= {"base_model": base_model.name.repo, "base_model_relation": "quantized"}
    front["tags"] = ["rotq", method, *(f"{number}-bit" for number in bits)]
    name = config.get("model_type", "model") if base_model is None else base_model.name.repo
    grids = "\n".join(f"- {_describe(group, len(groups))}" for group in groups) or TILES.format(
        bits=quantization.get("bits")
    )
    runtime = runtime_line(quantization)
    kept = ", ".join(f"`{layer}`" for layer in _together(quantization.get("ignore", ())))
    return TEMPLATE.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=f"{name}, {' and '.join(map(str, bits))} bits",
        origin=f" of `{base_model}`" if base_model is not None else "",
        grids=grids + (f"\n- not quantized: {kept}" if kept else ""),
        runtime=f"- at run time: {runtime}\n" if runtime else "",
        loading=_loading(quantization, obstacle).format(
            auto=auto, obstacle=obstacle, stored=quantization.get("format")
        ),
    )


def _together(names: Iterable[str]) -> Iterator[str]:
    """Those that differ in numbers alone as one, with an asterisk for each number."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(name)
    for pattern, same in found.items():
        yield pattern if len(same) > 1 else same[0]


def _loading(quantization: Mapping[str, Any], obstacle: str | None) -> str:
    if quantization["quant_method"] in ("rotq", "exl3"):
        return ROTQ if quantization["quant_method"] == "rotq" else EXL3
    return COMPRESSED_TENSORS if obstacle is None else NOT_TRANSFORMERS


def _describe(group: Mapping[str, Any], num_groups: int) -> str:
    weights = group["weights"]
    per = f"{weights['group_size']} columns" if weights["group_size"] else "output channel"
    if "block_structure" in weights:
        per = " x ".join(map(str, weights["block_structure"])) + " block"
    kind = "symmetric" if weights["symmetric"] else "asymmetric"
    if weights["type"] == "float":
        kind = f"floats, {group['format']}"
    if "state_bits" in weights:
        kind = f"paths through a trellis of 2^{weights['state_bits']} states"
    number = len(group["targets"])
    where = "linear layers" if num_groups == 1 else f"{number} targets of config.json"
    return f"{where}: {weights['num_bits']} bits, {kind}, one scale per {per}"
