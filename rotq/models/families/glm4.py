"""GLM-4: GLM with a norm behind each branch too.

What is added is norm(y) diag(g), and R^T diag(g) R is no diagonal matrix: R1 cannot be fused.
"""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="GLM-4",
    architectures=(
        "Glm4ForCausalLM",
        "Glm4vForConditionalGeneration",
        "Glm46VForConditionalGeneration",
        "GlmOcrForConditionalGeneration",
    ),
    mlp_inputs=("gate_up_proj",),
    mlp_up="",
    residual_rotation=False,
)
