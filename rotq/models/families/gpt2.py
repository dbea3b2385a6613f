"""GPT-2 and protein models of its class, as ProtGPT2.

Its linear layers are Conv1D modules, whose weights are transposed; rotq makes them nn.Linear (see
``linearize``), which only the rotq format can express. q, k and v are rows of one layer, positions
are learned and added to the residual stream.
"""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="GPT-2",
    architectures=("GPT2LMHeadModel",),
    embedding="transformer.wte",
    other_writers=("transformer.wpe",),
    blocks="transformer.h",
    final_norm="transformer.ln_f",
    layer_norm=True,
    attention_norm="ln_1",
    mlp_norm="ln_2",
    query="attn.c_attn",
    key="attn.c_attn",
    value="attn.c_attn",
    attention_output="attn.c_proj",
    mlp_inputs=("c_fc",),
    mlp_output="c_proj",
    residual_needs=(("add_cross_attention", False),),
    transposed=r"\.(c_attn|c_proj|c_fc)\.weight$",
)


def linearize(model: nn.Module) -> list[str]:
    """Replace every Conv1D by the nn.Linear of the same function; returns their names."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Conv1D)]
    for name, conv in found:
        in_features, out_features = conv.weight.shape
        linear = nn.Linear(in_features, out_features, device="meta")
        linear.weight = nn.Parameter(conv.weight.detach().T.contiguous(), requires_grad=False)
        linear.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=False)
        model.set_submodule(name, linear)
    return [name for name, _ in found]
