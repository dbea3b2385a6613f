"""GPT-Neo and GPT-BigCode (StarCoder): GPT-2's blocks with nn.Linear; learned positions."""

from rotq.models.generic import StreamAdapter

ADAPTER = StreamAdapter(
    family="GPT-Neo",
    architectures=("GPTNeoForCausalLM", "GPTBigCodeForCausalLM"),
    final_norm="transformer.ln_f",
    other_writers=("transformer.wpe",),
    layer_norm=True,
    readers={"ln_1": r"attn\.(attention\.[qkv]_proj|c_attn)", "ln_2": r"mlp\.c_fc"},
    stream_writers=r"attn\.(attention\.out_proj|c_proj)|mlp\.c_proj",
)
