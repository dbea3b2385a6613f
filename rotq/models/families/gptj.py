"""GPT-J and CodeGen: attention and MLP side by side behind one LayerNorm; the head has a bias."""

from rotq.models.generic import StreamAdapter

ADAPTER = StreamAdapter(
    family="GPT-J",
    architectures=("GPTJForCausalLM", "CodeGenForCausalLM"),
    final_norm="transformer.ln_f",
    layer_norm=True,
    readers={"ln_1": r"attn\.([qkv]_proj|qkv_proj)|mlp\.fc_in"},
    stream_writers=r"attn\.out_proj|mlp\.fc_out",
)
