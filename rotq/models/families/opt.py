"""OPT with norms before the branches, and BioGPT: learned positions, LayerNorms, biases.

OPT-350M has norms behind the sums and projects its embeddings; its stream cannot be rotated.
"""

from rotq.models.adapter import Like
from rotq.models.generic import StreamAdapter

ADAPTER = StreamAdapter(
    family="OPT",
    architectures=("OPTForCausalLM",),
    final_norm="model.decoder.final_layer_norm",
    other_writers=("model.decoder.embed_positions",),
    layer_norm=True,
    residual_needs=(
        ("do_layer_norm_before", True),
        ("_remove_final_layer_norm", False),
        ("word_embed_proj_dim", Like("hidden_size")),
    ),
    readers={"self_attn_layer_norm": r"self_attn\.[qkv]_proj", "final_layer_norm": "fc1"},
    stream_writers=r"self_attn\.out_proj|fc2",
)
