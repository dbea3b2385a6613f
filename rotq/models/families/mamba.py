"""Mamba, Mamba 2 and Falcon-Mamba: one branch per block, behind one norm.

The state lies between in_proj and out_proj.
"""

from rotq.models.generic import StreamAdapter

ADAPTER = StreamAdapter(
    family="Mamba",
    architectures=("MambaForCausalLM", "Mamba2ForCausalLM", "FalconMambaForCausalLM"),
    final_norm="backbone.norm_f",
    readers={"norm": r"mixer\.in_proj"},
    stream_writers=r"mixer\.out_proj",
)
