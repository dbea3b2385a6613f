"""ESM-C: Llama's module names, LayerNorms, a norm over all heads of q and k, ESM's head.

Linear layers of the released models have no biases, so what a norm adds stays in the norm.
"""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="ESM-C",
    architectures=("EsmcForMaskedLM",),
    embedding="esmc.embed_tokens",
    blocks="esmc.layers",
    final_norm="esmc.norm",
    head="lm_head.decoder",
    head_reader="lm_head.dense",
    layer_norm=True,
    norms_all_heads=True,
)
