"""Adapters: found by architecture, true to the modules they name, and honest about the rest."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_families import tiny_family
from tiny_models import CONFIGS, tiny_model
from torch import nn

from rotq.errors import RotqError
from rotq.models.adapter import Adapter
from rotq.models.experts import calibrating, unfuse_experts
from rotq.models.families.gpt2 import linearize
from rotq.models.generic import generic_adapter
from rotq.models.registry import ADAPTERS, adapter_for, find_adapter
from rotq.models.skeleton import Skeleton

FAMILIES = {
    "llama": "Llama",
    "llama-tied": "Llama",
    "llama-biases": "Llama",
    "mistral": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma3": "Gemma 3",
    "mixtral": "Mixtral",
    "qwen3-moe": "Qwen3-MoE",
    "qwen3-moe-mixed": "Qwen3-MoE",
    "gpt2": "GPT-2",
    "esm": "ESM-2",
    "esm-wide": "ESM-2",
    "esm-untied": "ESM-2",
    "esmc": "ESM-C",
    "bert": "BERT",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_family_by_model_type_and_by_architecture(name):
    model = tiny_model(name)
    config = model.config
    config.architectures = None
    assert find_adapter(config).family == FAMILIES[name]
    config.architectures = [type(model).__name__]
    config.model_type = "unknown"
    assert find_adapter(config).family == FAMILIES[name]


def test_every_architecture_exists_in_transformers():
    assert all(hasattr(transformers, architecture) for architecture in ADAPTERS)


def test_unknown_family_is_told_the_way_out():
    with pytest.raises(RotqError, match=r"no adapter for BloomForCausalLM.*models\.md") as e:
        find_adapter(transformers.BloomConfig())
    assert "rotation.residual=none" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_sites_hold_every_linear_once_and_share_their_input(name):
    model = tiny_model(name)
    unfuse_experts(model)
    linearize(model)
    adapter = adapter_for(model)
    inputs, order = {}, []
    for number, block in enumerate(model.get_submodule(adapter.blocks)):
        sites = adapter.sites(block)
        paths = [path for site in sites for path in site.linears]
        linears = {p: m for p, m in block.named_modules() if isinstance(m, nn.Linear)}
        assert sorted(paths) == sorted(linears)
        assert len({site.name for site in sites}) == len(sites)
        if number:
            continue
        for path, module in linears.items():
            module.register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args}))
            module.register_forward_pre_hook(lambda _, args, path=path: order.append(path))
        first = sites
    with calibrating(model):
        model(torch.arange(1, 9)[None])
    for site in first:
        shared = inputs[site.linears[0]][0]
        assert all(torch.equal(inputs[path][0], shared) for path in site.linears)
    if not adapter.has_experts(model.get_submodule(adapter.blocks)[0]):
        assert order == [path for site in first for path in site.linears]


def test_site_names():
    model = tiny_model("qwen3-moe-mixed")
    unfuse_experts(model)
    adapter = adapter_for(model)
    plain, mixture = (adapter.sites(block) for block in model.model.layers)
    assert [site.name for site in plain] == ["qkv", "o", "gate_up", "down"]
    downs = [f"down.{e}" for e in range(4)]
    assert [site.name for site in mixture] == ["qkv", "o", "gate_up", *downs]
    assert mixture[2].linears[:3] == (
        "mlp.experts.0.gate_proj",
        "mlp.experts.0.up_proj",
        "mlp.experts.1.gate_proj",
    )


def test_generic_adapter_finds_blocks_embedding_and_head():
    config = transformers.GPTNeoXConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    adapter = generic_adapter(model)
    assert adapter.blocks == "gpt_neox.layers"
    assert adapter.embedding == "gpt_neox.embed_in"
    assert adapter.head == "lm_head"
    assert not adapter.residual_rotation
    assert not adapter.value_rotation
    assert not adapter.down_rotation


def test_what_can_be_packed_is_found_by_running_the_blocks():
    config = transformers.BloomConfig(vocab_size=97, hidden_size=48, n_layer=2, n_head=4)
    skeleton = Skeleton.open(SimpleNamespace(config=config, names=list, load=None))
    sites = skeleton.adapter.sites(skeleton.blocks[0])
    assert [site.linears for site in sites] == [
        ("self_attention.query_key_value",),
        ("self_attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ]


def test_a_stream_is_matched_by_whole_paths_of_what_has_a_matrix():
    config = transformers.Qwen2MoeConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=2,
        num_experts=2,
        num_experts_per_tok=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        mlp_only_layers=[0],
    )
    skeleton = Skeleton.open(SimpleNamespace(config=config, names=list, load=None))
    plain, mixture = skeleton.blocks
    mlp = "post_attention_layernorm"
    assert skeleton.adapter.norms(plain)[mlp] == ("mlp.gate_proj", "mlp.up_proj")
    assert set(skeleton.adapter.norms(mixture)[mlp]) == {
        "mlp.gate",
        *(f"mlp.experts.{e}.{linear}_proj" for e in (0, 1) for linear in ("gate", "up")),
        "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj",
        "mlp.shared_expert_gate",
    }
    assert skeleton.adapter.writers(plain) == ("self_attn.o_proj", "mlp.down_proj")


def test_generic_adapter_wants_one_list_of_blocks():
    model = tiny_model("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(RotqError, match="one list of 5 decoder blocks, found none"):
        generic_adapter(model)
    model.config.num_hidden_layers = 2
    model.other = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    with pytest.raises(RotqError, match=r"found model\.layers, other"):
        generic_adapter(model)


def test_generic_adapter_wants_to_know_the_embedding():
    model = tiny_model("llama")

    def unknown():
        raise NotImplementedError("not auto-handled; please override")

    model.get_input_embeddings = unknown
    with pytest.raises(RotqError, match="LlamaForCausalLM does not say what embeds its tokens"):
        generic_adapter(model)


def test_adapter_without_experts_sees_no_router():
    assert Adapter(family="x", architectures=()).routers(nn.Module()) == ()


def test_experts_with_rows_of_their_own_are_no_site_together():
    """Llama 4's are found by running; an adapter that names them has one's rows for all."""
    model = tiny_family("llama4_text")
    unfuse_experts(model)
    named = Adapter(
        family="x",
        architectures=(),
        mlp="feed_forward",
        experts="feed_forward.experts",
        router="feed_forward.router",
    )
    block = model.model.layers[0]
    with pytest.raises(AssertionError, match="found by running"):
        named.sites(block)
    skeleton = Skeleton.open(SimpleNamespace(config=model.config, names=list, load=None))
    sites = skeleton.adapter.sites(skeleton.blocks[0])
    experts = [site.linears for site in sites if ".experts." in site.name]
    paths = [f"feed_forward.experts.{e}" for e in range(4)]
    both = ("gate_proj", "up_proj"), ("down_proj",)
    assert experts == [
        tuple(f"{path}.{name}" for name in names) for path in paths for names in both
    ]


@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "falcon_h1", "llama4_text", "deepseek_v3"])
def test_layers_of_a_found_site_read_the_same(name):
    model = tiny_family(name)
    skeleton = Skeleton.open(SimpleNamespace(config=model.config, names=list, load=None))
    unfuse_experts(model)
    adapter = skeleton.adapter
    blocks = model.get_submodule(adapter.blocks)
    for number, block in enumerate(skeleton.blocks):
        sites, inputs = adapter.sites(block), {}
        assert any(len(site.linears) > 1 for site in sites)
        for path in (path for site in sites for path in site.linears):
            linear = blocks[number].get_submodule(path)
            # a copy: the model may change its tensor behind the call
            linear.register_forward_pre_hook(
                lambda _, args, path=path, seen=inputs: seen.update({path: args[0].clone()})
            )
        with calibrating(model), torch.no_grad():
            model(torch.arange(3, 12)[None], use_cache=False)
        for site in sites:
            first = inputs[site.linears[0]].flatten(0, -2)
            assert all(torch.equal(inputs[path].flatten(0, -2), first) for path in site.linears)


def test_opt_whose_norms_follow_its_sums_is_not_rotated():
    adapter = ADAPTERS["OPTForCausalLM"]
    small = {"hidden_size": 64, "word_embed_proj_dim": 64}
    assert adapter.residual_obstacle(transformers.OPTConfig(**small)) is None
    for changes in ({"do_layer_norm_before": False}, {"word_embed_proj_dim": 32}):
        config = transformers.OPTConfig(**{**small, **changes})
        (key,) = changes
        assert key in adapter.residual_obstacle(config)
