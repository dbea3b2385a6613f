"""What a user may have meant by an option, a command or a preset that rotq does not have."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator

import click

from rotq.recipe import Recipe

OPTIONS = {
    "-c": ("recipe", "preset", "scheme", "method", "quant"),
    "-o": ("out", "out-dir", "output-dir", "save", "save-dir", "save-path"),
    "--calibration": ("calib", "calib-data", "calibration-data", "dataset", "data"),
    "--num-samples": ("nsamples", "n-samples", "samples", "num-calibration-samples"),
    "--seq-len": ("seqlen", "sequence-length", "max-seq-len", "max-seq-length", "block-size"),
    "--overwrite": ("force", "f", "yes", "y"),
    "--device": ("cuda", "gpu", "cpu"),
    "--dtype": ("torch-dtype", "precision", "fp16", "bf16"),
    "--text": ("dataset", "data", "eval-text", "file"),
    "--eval-text": ("eval", "ppl", "text"),
    "--fasta": ("text", "data", "file"),
    "--windows": ("num-samples", "samples", "limit"),
    "--task-files": ("include-path", "data-dir"),
    "--num-fewshot": ("shots", "fewshot", "num-shots"),
    "--reference": ("baseline", "base", "original"),
    "--kv": ("kv-cache", "kv-cache-dtype", "preset"),
    "--kv-calibration": ("calibration", "kv-file"),
    "--kv-memory": ("memory", "gpu-memory-utilization"),
    "--max-batch": ("max-num-seqs", "batch-size"),
    "--max-length": ("max-model-len", "ctx-size", "context-length"),
    "--model-name": ("served-model-name", "alias"),
    "--version": ("V", "v"),
}
"""Words of other tools for an option, without dashes."""

KEYS = {
    "weights.bits": ("bits", "b", "wbits", "w-bits", "w-bit", "nbits"),
    "weights.group_size": ("groupsize", "g", "q-group-size"),
    "weights.symmetric": ("sym", "asym", "zero-point"),
    "activations.bits": ("a-bits", "abits", "act-bits"),
    "kv_cache.bits": ("kv-bits",),
    "solver.damping": ("percdamp", "damp-percent", "dampening-frac"),
    "solver.order": ("act-order", "actorder", "desc-act"),
    "tuning.learning_rate": ("lr",),
    "tuning.steps": ("iters", "epochs"),
}
"""Words of other tools for a key of the recipe."""

COMMANDS = {
    "quantize": ("quant", "convert", "compress"),
    "eval ppl": ("perplexity", "evaluate"),
    "eval tasks": ("lm-eval", "lm_eval", "harness"),
    "inspect": ("info", "show", "verify"),
    "report": ("page", "html", "plot"),
    "push": ("upload", "publish", "push-to-hub"),
    "export": ("to-gguf", "gguf", "gptq"),
    "serve-kv": ("serve", "server", "run", "chat", "generate"),
    "bench serve": ("benchmark",),
    "calibrate-kv": ("calibrate",),
    "--version": ("version",),
    "--help": ("help",),
}
"""Words of other tools for a command."""


def hint_for_option(name: str, ctx: click.Context) -> str:
    """What to write in place of an unknown option; empty where nothing comes near."""
    word = name.lstrip("-").partition("=")[0].replace("_", "-")
    own = {spelling for param in ctx.command.params for spelling in param.opts}
    meant = [option for option, words in OPTIONS.items() if option in own and word in words]
    if not meant and "--set" in own:
        meant = [f"--set {key}=..." for key in _keys_named(word)]
    if not meant and word == "model" and any(p.name == "model" for p in ctx.command.params):
        return "the model is given without an option's name"
    if not meant and isinstance(ctx.command, click.Group) and _known_below(name, ctx.command):
        return "options stand behind the command"
    return f"did you mean {' or '.join(meant)}?" if meant else ""


def hint_for_command(name: str, ctx: click.Context) -> str:
    """What to write in place of an unknown command; empty where nothing comes near."""
    root = ctx.find_root().command
    assert isinstance(root, click.Group)
    spelled = {path: path for path in _paths(root, "")}
    last = {path.rpartition(" ")[2]: path for path in spelled}
    words = {word: path for path, others in COMMANDS.items() for word in others}
    known = {**last, **words, **spelled}
    path = known.get(name.lower()) or known.get(nearest(name, {**last, **spelled}))
    return f"did you mean {ctx.find_root().info_name} {path}?" if path else ""


def nearest(name: str, names: Iterable[str]) -> str:
    """The name that comes nearest, letters' case aside; empty where none comes near."""
    by_lower = {known.lower(): known for known in names}
    found = difflib.get_close_matches(name.lower()[:80], by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else ""


def _keys_named(word: str) -> list[str]:
    """Keys of the recipe for a word: of other tools, or the last part of the key itself."""
    known = [key for key, words in KEYS.items() if word in words]
    name = word.replace("-", "_")
    return known or [key for key in _recipe_keys() if key.rpartition(".")[2] == name]


def _recipe_keys() -> Iterator[str]:
    """Every key of a recipe's sections, dotted."""
    for section, value in Recipe().__dict__.items():
        if dataclasses.is_dataclass(value):
            yield from (f"{section}.{field.name}" for field in dataclasses.fields(value))


def _paths(group: click.Group, prefix: str) -> Iterator[str]:
    """Commands of a group and of those in it, as they are typed."""
    for name, command in group.commands.items():
        yield f"{prefix}{name}"
        if isinstance(command, click.Group):
            yield from _paths(command, f"{prefix}{name} ")


def _known_below(option: str, group: click.Group) -> bool:
    """Whether a command of the group, or of one in it, has the option."""
    for command in group.commands.values():
        if isinstance(command, click.Group) and _known_below(option, command):
            return True
        if any(option in param.opts for param in command.params):
            return True
    return False
