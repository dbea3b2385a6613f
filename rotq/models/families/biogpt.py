"""BioGPT: OPT's blocks; embeddings times a scalar, learned positions."""

from rotq.models.generic import StreamAdapter

ADAPTER = StreamAdapter(
    family="BioGPT",
    architectures=("BioGptForCausalLM",),
    final_norm="biogpt.layer_norm",
    other_writers=("biogpt.embed_positions",),
    layer_norm=True,
    readers={"self_attn_layer_norm": r"self_attn\.[qkv]_proj", "final_layer_norm": "fc1"},
    stream_writers=r"self_attn\.out_proj|fc2",
)
