"""GPT-NeoX and Pythia: LayerNorms, biases, branches side by side or in turn, each with its norm.

q, k and v are rows of one layer, head by head, so that values are not its last rows: R2 is left
out.
"""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="GPT-NeoX",
    architectures=("GPTNeoXForCausalLM",),
    embedding="gpt_neox.embed_in",
    blocks="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    layer_norm=True,
    query="attention.query_key_value",
    key="attention.query_key_value",
    value="attention.query_key_value",
    attention_output="attention.dense",
    mlp_inputs=("dense_h_to_4h",),
    mlp_up="",
    mlp_output="dense_4h_to_h",
    value_rotation=False,
)
