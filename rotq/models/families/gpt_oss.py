"""gpt-oss: attention sinks, biases, experts with a clamped gate of their own.

A sink is a logit beside those of the keys, which rotations leave as they are. The experts multiply
(up + 1), clamped, so that up's output is no free factor.
"""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="gpt-oss",
    architectures=("GptOssForCausalLM",),
    experts="mlp.experts",
    router="mlp.router",
    mlp_up="",
)
