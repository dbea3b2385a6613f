"""Recipes that search for a basis, and a block that spoils the search."""

import math

from rotq.transform.student import Student

SCALED = ["qkv", "gate_up", "value", "query_key", "up"]
W4A4KV4 = {
    "weights.bits": 4,
    "weights.group_size": -1,
    "activations.bits": 4,
    "kv_cache.bits": 4,
    "rotation.residual": "hadamard",
    "rotation.value": "hadamard",
    "rotation.attention": "hadamard",
    "rotation.down": "hadamard",
    "output.format": "rotq",
    "calibration.precision": "highest",
}
LEARNED = {
    **W4A4KV4,
    "transform.method": "learned",
    "transform.scalings": SCALED,
    "transform.balance": ["value", "query_key", "up"],
    "transform.layer_steps": 3,
    "transform.steps": 6,
    "transform.top_k": 32,
}


def spoil_block(monkeypatch, number: int = 1) -> None:
    """Let one block's up projection be not finite once it is fused."""
    fused = Student.fused_block

    def broken(self, index, basis):
        block, tensors = fused(self, index, basis)
        if index == number:
            tensors["mlp.up_proj.weight"] = tensors["mlp.up_proj.weight"] * math.nan
        return block, tensors

    monkeypatch.setattr(Student, "fused_block", broken)
