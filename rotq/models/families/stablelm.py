"""StableLM: Llama with LayerNorms; the variant with branches side by side is another."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="StableLM",
    architectures=("StableLmForCausalLM",),
    layer_norm=True,
    residual_needs=(("use_parallel_residual", False),),
)
