"""Hostile config.json, and the smaller files beside it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import Bench, Case

DEEP = "[" * 100_000 + "]" * 100_000

BYTES: dict[str, bytes | str] = {
    "empty": "",
    "cut": '{"model_type": "llama", "hidden',
    "a-list": "[]",
    "a-number": "3",
    "nul": b"\0" * 64,
    "latin-1": b'{"model_type": "\xe9"}',
    "deep": DEEP,
    "deep-within": '{"model_type": "llama", "x": ' + DEEP + "}",
    "no-type": "{}",
    "null-type": '{"model_type": null}',
    "list-type": '{"model_type": ["llama"]}',
    "unknown-type": '{"model_type": "no-such-model"}',
    "path-type": '{"model_type": "../../llama"}',
    "long-digits": '{"model_type": "llama", "hidden_size": ' + "9" * 10_000 + "}",
    "escapes": '{"model_type": "\\u001b[31mred\\nline"}',
}

VALUES: dict[str, dict[str, Any]] = {
    "hidden-negative": {"hidden_size": -96},
    "hidden-zero": {"hidden_size": 0},
    "hidden-string": {"hidden_size": "96"},
    "hidden-null": {"hidden_size": None},
    "hidden-fraction": {"hidden_size": 96.5},
    "hidden-huge": {"hidden_size": 10**12},
    "layers-huge": {"num_hidden_layers": 10**9},
    "layers-zero": {"num_hidden_layers": 0},
    "layers-negative": {"num_hidden_layers": -1},
    "layers-string": {"num_hidden_layers": "three"},
    "layers-more": {"num_hidden_layers": 40},
    "vocabulary-huge": {"vocab_size": 10**13},
    "vocabulary-negative": {"vocab_size": -3},
    "vocabulary-small": {"vocab_size": 10},
    "heads-zero": {"num_attention_heads": 0},
    "heads-odd": {"num_attention_heads": 7},
    "heads-list": {"num_attention_heads": [6]},
    "kv-heads-zero": {"num_key_value_heads": 0},
    "kv-heads-odd": {"num_key_value_heads": 4},
    "kv-heads-more": {"num_key_value_heads": 60},
    "head-dim-zero": {"head_dim": 0},
    "head-dim-odd": {"head_dim": 15},
    "head-dim-negative": {"head_dim": -16},
    "inner-huge": {"intermediate_size": 10**11},
    "inner-object": {"intermediate_size": {}},
    "positions-zero": {"max_position_embeddings": 0},
    "positions-huge": {"max_position_embeddings": 10**18},
    "positions-string": {"max_position_embeddings": "many"},
    "rope-string": {"rope_parameters": "yarn"},
    "rope-unknown": {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
    "rope-nan": {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}},
    "rope-zero": {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
    "rope-word": {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
    "rope-yarn-empty": {"rope_parameters": {"rope_type": "yarn"}},
    "activation-unknown": {"hidden_act": "wavy"},
    "activation-number": {"hidden_act": 3},
    "eps-string": {"rms_norm_eps": "small"},
    "dtype-unknown": {"dtype": "float7"},
    "dtype-function": {"dtype": "nn"},
    "dtype-list": {"dtype": ["float32"]},
    "dtype-number": {"dtype": 32},
    "architectures-string": {"architectures": "LlamaForCausalLM"},
    "architectures-numbers": {"architectures": [1, None]},
    "architectures-other": {"architectures": ["LlamaForNothing"]},
    "architectures-builtin": {"architectures": ["__import__"]},
    "tied-string": {"tie_word_embeddings": "perhaps"},
    "padding-far": {"pad_token_id": 10**9},
    "padding-word": {"pad_token_id": "x"},
    "end-object": {"eos_token_id": {"a": 1}},
    "attention-flash": {"_attn_implementation": "flash_attention_2"},
    "attention-unknown": {"_attn_implementation": "telepathy"},
    "attention-hub": {"_attn_implementation": "kernels-community/nothing"},
    "layer-types": {"layer_types": ["full_attention"]},
    "layer-types-word": {"layer_types": "sliding"},
    "text-config": {"text_config": "x"},
    "code": {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
    "code-outside": {"auto_map": {"AutoConfig": "../../evil.Config"}},
    "quantized-string": {"quantization_config": "int4"},
    "quantized-list": {"quantization_config": [1]},
    "quantized-empty-groups": {
        "quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}
    },
    "quantized-other": {"quantization_config": {"quant_method": "bitsandbytes"}},
    "quantized-group-word": {
        "quantization_config": {"quant_method": "rotq", "version": 1, "config_groups": {"a": "b"}}
    },
    "quantized-weights-word": {
        "quantization_config": {
            "quant_method": "rotq",
            "version": 1,
            "config_groups": {"a": {"targets": ["Linear"], "weights": "int4"}},
        }
    },
    "quantized-no-targets": {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"a": {"weights": {"type": "int", "num_bits": 4}}},
        }
    },
}

PACKED: dict[str, dict[str, Any]] = {
    "bits": {"num_bits": 99},
    "bits-word": {"num_bits": "four"},
    "group": {"group_size": 0},
    "group-other": {"group_size": 48},
    "symmetric": {"symmetric": "yes"},
    "strategy": {"strategy": ["group"]},
    "type": {"type": "float"},
}
"""Of the weights of a packed checkpoint's first group."""


def cases() -> Iterator[Case]:
    for name, content in BYTES.items():
        yield from _each(name, lambda b, c=content: b.damaged(b.llama, "config.json", c))
    for name, changes in VALUES.items():
        yield from _each(name, lambda b, c=changes: changed(b, b.llama, c))
    yield Case("config-is-a-folder-quantize", _config_is_a_folder)
    for name, changes in PACKED.items():
        yield Case(f"packed-{name}-ppl", lambda b, c=changes: b.ppl(_packed(b, weights=c)))
        yield Case(f"packed-{name}-see", lambda b, c=changes: ["inspect", _packed(b, weights=c)])
    for name, targets in {"slow": ["re:(.|[a-z])*!$"], "broken": ["re:("], "numbers": [1]}.items():
        yield Case(
            f"packed-targets-{name}-ppl",
            lambda bench, t=targets: bench.ppl(_packed(bench, targets=t)),
        )
    for name, content in {"cut": "{", "list": "[]", "words": '{"eos_token_id": "x"}'}.items():
        yield Case(
            f"generation-{name}-ppl",
            lambda bench, c=content: bench.ppl(
                bench.damaged(bench.llama, "generation_config.json", c)
            ),
        )


def _each(name: str, build: Any) -> Iterator[Case]:
    yield Case(f"config-{name}-dry", lambda bench: bench.quantize(build(bench)))
    yield Case(f"config-{name}-job", lambda bench: bench.quantize(build(bench), bench.out()))
    yield Case(f"config-{name}-ppl", lambda bench: bench.ppl(build(bench)))
    yield Case(f"config-{name}-inspect", lambda bench: ["inspect", build(bench)])


def changed(bench: Bench, model: Path, changes: dict[str, Any]) -> Path:
    """A copy of a model with some values of its config changed."""
    values = json.loads((model / "config.json").read_text()) | changes
    return bench.damaged(model, "config.json", json.dumps(values))


def _packed(bench: Bench, *, weights: dict[str, Any] | None = None, targets: Any = None) -> Path:
    declared = json.loads((bench.packed / "config.json").read_text())["quantization_config"]
    group = next(iter(declared["config_groups"].values()))
    group["weights"] |= weights or {}
    group["targets"] = targets or group["targets"]
    return changed(bench, bench.packed, {"quantization_config": declared})


def _config_is_a_folder(bench: Bench) -> list[object]:
    model = bench.copy(bench.llama)
    (model / "config.json").unlink()
    (model / "config.json").mkdir()
    return bench.quantize(model, bench.out())
