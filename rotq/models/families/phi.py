"""Phi-1 and Phi-2: attention and MLP side by side behind one LayerNorm; biases everywhere."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="Phi",
    architectures=("PhiForCausalLM",),
    final_norm="model.final_layernorm",
    layer_norm=True,
    mlp_norm="input_layernorm",
    attention_output="self_attn.dense",
    mlp_inputs=("fc1",),
    mlp_up="",
    mlp_output="fc2",
)
