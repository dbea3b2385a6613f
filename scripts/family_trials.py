"""What is tried on a tiny random model of a family: jobs, reloads, the packed cache, transformers.

A trial is ``ok`` with an empty reason, ``refused`` in one line, or a ``crash``. A job whose result
is wrong ends with CheckFailed, which is a crash too.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kv_oracle
import tiny_families
import tiny_multimodal
import torch
from tiny_multimodal import CLASSES
from torch import Tensor

import rotq.quantize.publish
from rotq.checkpoint.inspection import REPORT
from rotq.checkpoint.load import load_model
from rotq.checkpoint.opening import describe_source
from rotq.errors import CheckFailed, RotqError
from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.calibration.calibrate import data_oblivious
from rotq.kv.presets import preset
from rotq.models.registry import adapter_for
from rotq.models.skeleton import Skeleton
from rotq.quantize.estimate import estimate
from rotq.quantize.pipeline import quantize_model
from rotq.quantize.setup import starting_basis
from rotq.recipe import Recipe, load_recipe

CONFIGS = Path(__file__).parents[1] / "configs"
ROTATIONS = ("residual", "value", "attention", "down")
ROTQ_FORMAT = {"output.format": "rotq"}
COMPARED = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "olmo2", "smollm3", "glm4"),
    *("granite", "starcoder2", "cohere2", "exaone4", "qwen3_5_text"),
    *("mixtral", "qwen3_moe", "deepseek_v3", "llama4_text"),
)
"""Families whose results are loaded by transformers alone too, which takes seconds for each."""

Trial = dict[str, str]

_ALONE = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(torch.load(sys.argv[2]), use_cache=False).logits
torch.save(logits, sys.argv[3])
"""


def tiny_model(family: str) -> Any:
    """A random one of a family, or of a class of several parts."""
    if family in CLASSES:
        return tiny_multimodal.tiny_multimodal(CLASSES[family])
    return tiny_families.tiny_family(family)


def try_family(family: str, folder: Path) -> dict[str, Any]:
    """All trials by name; only ``made`` where transformers cannot make the family so small."""
    model, text = folder / "model", folder / "text.txt"
    try:
        tiny_model(family).save_pretrained(model)
    except Exception as error:
        return {"made": _trial("refused", error)}
    tiny_families.byte_tokenizer().save_pretrained(model)
    text.write_text("The cat sat on the mat, and dogs ran over the hills. " * 20)
    found: dict[str, Any] = {"made": _OK}
    found["quantized"] = job(model, small_recipe("rtn", text), folder / "out")
    form = {}
    if "set output.format=rotq" in found["quantized"]["why"]:
        form = ROTQ_FORMAT
    if form or found["quantized"] == _OK:
        found |= _more(family, model, text, folder, form)
    return found


def _more(
    family: str, model: Path, text: Path, folder: Path, form: dict[str, Any]
) -> dict[str, Any]:
    """What is tried where the family can be quantized at all."""
    found: dict[str, Any] = {}
    skeleton = Skeleton.open(describe_source(model))
    for name in ROTATIONS:
        recipe = small_recipe("rtn", text, {f"rotation.{name}": "hadamard", **ROTQ_FORMAT})
        # what the dry run asks, without its windows; a family's file says why
        asked = attempt(functools.partial(starting_basis, recipe, skeleton))
        found[name] = asked if asked["outcome"] == "crash" else {**asked, "why": ""}
    wanted = {f"rotation.{name}": "hadamard" for name in ROTATIONS if found[name] == _OK}
    rotated = small_recipe("rtn", text, {**wanted, **ROTQ_FORMAT})
    found["rotated"] = job(model, rotated, folder / "rotated")
    tuned = {"tuning.steps": 2, "tuning.seq_len": 32, **form}
    found["w3 tuned"] = job(model, small_recipe("w3", text, tuned), folder / "w3")
    found["cache"] = attempt(lambda: check_cache(family))
    if family in CLASSES:
        found["image"] = attempt(lambda: check_image(family, folder / "out"))
    if family in COMPARED:
        symmetric = small_recipe("rtn", text, {"weights.symmetric": True})
        found["transformers"] = attempt(lambda: check_transformers(model, symmetric, folder))
    return found


def small_recipe(config: str, text: Path, changes: dict[str, Any] | None = None) -> Recipe:
    """A preset on two windows of 32 tokens."""
    small: dict[str, Any] = {
        "calibration.source": str(text),
        "calibration.num_samples": 2,
        "calibration.seq_len": 32,
        "weights.group_size": 16,
        "weights.group_fallback": "auto",
    }
    return load_recipe(CONFIGS / f"{config}.yaml", {**small, **(changes or {})})


def job(model: Path, recipe: Recipe, out: Path) -> Trial:
    """A job and its dry run, which must say the same."""
    dry = attempt(lambda: estimate(model, recipe))
    real = attempt(lambda: quantize_model(model, recipe, out))
    if "crash" in (dry["outcome"], real["outcome"]):
        return real if real["outcome"] == "crash" else {**dry, "why": f"dry run: {dry['why']}"}
    if dry == real:
        return real
    return {"outcome": "crash", "why": f"the dry run says {dry}, the job {real}"}


def attempt(run: Callable[[], object]) -> Trial:
    """What came of it."""
    try:
        run()
    except CheckFailed as error:
        return _trial("crash", error)
    except (RotqError, ValueError) as error:
        return _trial("refused" if "\n" not in str(error) else "crash", error)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return {"outcome": "crash", "why": f"{type(error).__name__}: {_line(error)} ({where})"}
    return _OK


@torch.no_grad()
def check_cache(family: str) -> None:
    """Token by token with a packed cache, against a dense one that gives decoded codes back.

    Two texts are tried, since one value that lies between two codes may be coded as either; the
    smaller difference counts.

    Raises:
        RotqError: the family is refused.
        CheckFailed: logits differ.
    """
    model = tiny_model(family)
    calibration = data_oblivious(model.config, preset("k8v3"))
    differences = []
    for step in (7, 11):
        ids_BT = torch.arange(30)[None] * step % 200 + 3
        found = stepwise(model, PackedCache(model, calibration), ids_BT)
        expected = stepwise(model, kv_oracle.oracle_cache(calibration), ids_BT)
        differences.append(_difference(found, expected))
    _check(min(differences), 1e-4)


def check_image(family: str, out: Path) -> None:
    """An image between words: packed layers against dense ones, and towers as they were.

    Raises:
        RotqError: no image can be made for the class here.
        CheckFailed: logits differ by more than fp32 rounds, or a tensor beside the decoder does.
    """
    made = tiny_model(family)
    try:
        inputs = tiny_multimodal.image_inputs(made)
        with torch.no_grad():
            made(**inputs)
    except Exception as error:
        raise RotqError(f"no image was made for it: {_line(error)}") from None
    adapter = adapter_for(made)
    dense, packed = load_model(out, packed=False), load_model(out)
    before, after = made.state_dict(), packed.state_dict()
    for name in before:
        if adapter.is_beside(name) and not torch.equal(before[name], after[name]):
            raise CheckFailed(f"{name} is not what it was")
    with torch.no_grad():
        found, expected = packed(**inputs).logits, dense(**inputs).logits
    _check(_difference(found, expected), 2e-5)


def stepwise(model: Any, cache: Any, ids_BT: Tensor) -> Tensor:
    """Logits of ten tokens at once and of the others one by one."""
    chunks = ids_BT.split([10, *[1] * (ids_BT.shape[1] - 10)], dim=1)
    logits = [model(input_ids=chunk, past_key_values=cache, use_cache=True) for chunk in chunks]
    return torch.cat([one.logits for one in logits], dim=1)


def check_transformers(model: Path, symmetric: Recipe, folder: Path) -> None:
    """transformers without rotq, against the dense model with the dequantized weights put in.

    Args:
        symmetric: For a job whose result transformers loads, where it does not load that of rtn.

    Raises:
        RotqError: transformers cannot load it, and rotq has said so.
        CheckFailed: logits differ by more than fp32 rounds.
    """
    out = folder / "out"
    if transformers_obstacle(out) is not None:
        out = folder / "symmetric"
        quantize_model(model, symmetric, out)
    obstacle = transformers_obstacle(out)
    if obstacle is not None:
        raise RotqError(obstacle)
    ids_BT = torch.arange(30)[None] * 7 % 200 + 3
    ids, logits = folder / "ids.pt", folder / "logits.pt"
    torch.save(ids_BT, ids)
    command = [sys.executable, "-c", _ALONE, str(out), str(ids), str(logits)]
    alone = subprocess.run(command, capture_output=True, text=True)
    if alone.returncode:
        raise RuntimeError(alone.stderr.strip().splitlines()[-1])
    dense = load_model(out, dtype=torch.float32, packed=False)
    with torch.no_grad():
        expected = dense(ids_BT, use_cache=False).logits
    _check(_difference(torch.load(logits), expected), 2e-5)


def transformers_obstacle(out: Path) -> str | None:
    """The report's note that transformers alone cannot load a checkpoint."""
    notes = json.loads((out / REPORT).read_text())["notes"]
    return next((note for note in notes if note.startswith("transformers cannot load")), None)


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _check(difference: float, tolerance: float) -> None:
    if not difference <= tolerance:
        raise CheckFailed(f"logits differ by {difference:.2g} of the largest")


def reload_here(out: Path, ids_BT: Any, logits_BTV: Any, **options: Any) -> None:
    """``check_reload`` in this process, which is a fresh one for each family."""
    found = load_model(out, **options)(ids_BT, use_cache=False).logits
    if not torch.equal(found, logits_BTV):
        difference = (found.double() - logits_BTV.double()).abs().max()
        raise CheckFailed(f"it does not reproduce the quantized model: {difference:.3g}")


rotq.quantize.publish.check_reload = reload_here

_OK: Trial = {"outcome": "ok", "why": ""}


def _trial(outcome: str, error: BaseException) -> Trial:
    return {"outcome": outcome, "why": _line(error)}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
