"""OLMo: LayerNorms without gain and bias.

``clip_qkv`` clamps values feature by feature, which no rotation passes: R2 is left out.
"""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="OLMo",
    architectures=("OlmoForCausalLM",),
    layer_norm=True,
    value_rotation=False,
)
