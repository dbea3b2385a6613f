"""Blocks run one by one must give what the whole model gives."""

import pytest
import torch
import transformers
from tiny_families import LEFT_OUT
from tiny_models import CONFIGS, MemorySource, random_ids, tiny_model

from rotq.calibration.capture import run_block
from rotq.errors import RotqError
from rotq.models.skeleton import Skeleton


def run_by_blocks(skeleton, source, ids_BT, mask_BT=None, dtype=torch.float64):
    outer = skeleton.load_outer(source, dtype=dtype)
    hidden_BTD = skeleton.embed(outer, ids_BT, mask_BT)
    for index in range(skeleton.num_blocks):
        block = skeleton.load_block(index, source, device="cpu", dtype=dtype)
        hidden_BTD = block(hidden_BTD, **skeleton.block_kwargs(index, hidden_BTD, mask_BT))
    return skeleton.logits(outer, hidden_BTD)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_blocks_one_by_one_are_the_model(name, dtype):
    model = tiny_model(name, dtype=dtype)
    source = MemorySource(model)
    ids_BT = random_ids(2, 11)
    logits = run_by_blocks(Skeleton.open(source), source, ids_BT, dtype=dtype)
    assert torch.equal(logits, model(ids_BT).logits)


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma3", "mixtral", "gpt2", "esm", "esmc", "bert"]
)
def test_padding_mask(name):
    model = tiny_model(name)
    source = MemorySource(model)
    ids_BT = random_ids(2, 9)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :4] = 0
    by_blocks = run_by_blocks(Skeleton.open(source), source, ids_BT, mask_BT)
    assert torch.equal(by_blocks, model(ids_BT, attention_mask=mask_BT).logits)
    assert not torch.equal(by_blocks, model(ids_BT).logits)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_sliding_window_reaches_the_blocks(name):
    # 11 tokens are more than the window of 5, so that a forgotten mask is seen
    source = MemorySource(tiny_model(name))
    skeleton = Skeleton.open(source)
    hidden_BTD = torch.randn(1, 11, 48, dtype=torch.float64)
    block = skeleton.load_block(0, source, device="cpu", dtype=torch.float64)
    kwargs = skeleton.block_kwargs(0, hidden_BTD)
    changed_BTD = hidden_BTD.clone()
    changed_BTD[:, 0] += 1
    difference_T = (block(changed_BTD, **kwargs) - block(hidden_BTD, **kwargs))[0].abs().amax(-1)
    assert (difference_T[:5] > 1e-6).all()
    assert (difference_T[5:] == 0).all()


def test_gemma_layers_get_their_own_positions():
    skeleton = Skeleton.open(MemorySource(tiny_model("gemma3")))
    hidden_BTD = torch.zeros(1, 7, 48, dtype=torch.float64)
    local, wide = (skeleton.block_kwargs(i, hidden_BTD)["position_embeddings"][0] for i in (0, 1))
    assert local.dtype == torch.float64
    assert not torch.equal(local, wide)


def test_block_kwargs_are_kept_for_a_few_shapes():
    skeleton = Skeleton.open(MemorySource(tiny_model("llama")))
    lengths = [torch.zeros(1, length, 48) for length in (3, 4, 5, 6, 7)]
    first = [skeleton.block_kwargs(1, hidden_BTD) for hidden_BTD in lengths]
    assert skeleton.block_kwargs(1, lengths[1]) is first[1]
    assert skeleton.block_kwargs(1, lengths[0]) is not first[0]


def test_block_kwargs_are_kept_by_shape_and_never_with_padding():
    skeleton = Skeleton.open(MemorySource(tiny_model("llama")))
    hidden_BTD = torch.zeros(2, 7, 48)
    first = skeleton.block_kwargs(0, hidden_BTD)
    assert skeleton.block_kwargs(0, hidden_BTD + 1) is first
    assert first["position_embeddings"][0].shape == (1, 7, 16)
    assert first["use_cache"] is False
    padded = skeleton.block_kwargs(0, hidden_BTD, torch.tensor([[0] + [1] * 6, [1] * 7]))
    assert padded["attention_mask"].shape[-2:] == (7, 7)
    assert skeleton.block_kwargs(0, hidden_BTD)["attention_mask"] is None
    longer = skeleton.block_kwargs(0, torch.zeros(2, 8, 48))
    assert longer["position_embeddings"][0].shape == (1, 8, 16)
    wide = skeleton.block_kwargs(0, hidden_BTD.double())
    assert wide["position_embeddings"][0].dtype == torch.float64


def test_blocks_are_fresh_frozen_and_share_the_config():
    source = MemorySource(tiny_model("llama"))
    skeleton = Skeleton.open(source)
    first, second = (
        skeleton.load_block(1, source, device="cpu", dtype=torch.float32) for _ in range(2)
    )
    first.mlp.down_proj.weight.zero_()
    assert second.mlp.down_proj.weight.abs().min() > 0
    assert not any(p.requires_grad for p in first.parameters())
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    assert not first.training
    assert first.self_attn.config is skeleton.config
    assert {p.device.type for p in skeleton.model.parameters()} == {"meta"}


def test_opening_leaves_the_sources_config_alone():
    source = MemorySource(tiny_model("mixtral"))
    source.config.output_router_logits = True
    before = source.config.to_dict()
    skeleton = Skeleton.open(source)
    assert source.config.to_dict() == before
    assert run_by_blocks(skeleton, source, random_ids(1, 4)).shape == (1, 4, 97)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_outer_tensors(name):
    source = MemorySource(tiny_model(name))
    skeleton = Skeleton.open(source)
    outer = skeleton.load_outer(source, dtype=torch.float32)
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    assert set(outer) == names | (set() if name == "llama-tied" else {"lm_head.weight"})
    assert skeleton.tied == (name == "llama-tied")
    assert {tensor.dtype for tensor in outer.values()} == {torch.float32}


@pytest.mark.parametrize("differs", [False, True])
def test_a_stored_head_of_a_tied_model_counts_if_it_differs(differs):
    source = MemorySource(tiny_model("llama-tied"))
    head_VD = source.tensors["model.embed_tokens.weight"].clone()
    head_VD[3, 5] += differs
    source.tensors["lm_head.weight"] = head_VD
    outer = Skeleton.open(source).load_outer(source, dtype=torch.float64)
    assert ("lm_head.weight" in outer) == differs


def test_a_head_of_its_own_wins_over_the_tied_embedding():
    model = tiny_model("llama-tied")
    source = MemorySource(model)
    skeleton = Skeleton.open(source)
    outer = skeleton.load_outer(source, dtype=torch.float64)
    hidden_BTD = torch.randn(1, 3, 48, dtype=torch.float64)
    untied = {**outer, "lm_head.weight": 2 * outer["model.embed_tokens.weight"]}
    twice = 2 * skeleton.logits(outer, hidden_BTD)
    torch.testing.assert_close(skeleton.logits(untied, hidden_BTD), twice, rtol=1e-12, atol=0)


def test_missing_tensor_is_named():
    source = MemorySource(tiny_model("llama"))
    skeleton = Skeleton.open(source)
    del source.tensors["model.layers.1.mlp.up_proj.weight"]
    skeleton.load_block(0, source, device="cpu", dtype=torch.float32)
    with pytest.raises(RotqError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        skeleton.load_block(1, source, device="cpu", dtype=torch.float32)
    del source.tensors["model.norm.weight"]
    with pytest.raises(RotqError, match=r"no tensor model\.norm\.weight"):
        skeleton.load_outer(source, dtype=torch.float32)


def test_wrong_shape_is_named():
    source = MemorySource(tiny_model("llama"))
    source.tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(64, 48)
    with pytest.raises(RotqError, match=r"k_proj\.weight: .* \(64, 48\), .* \(32, 48\)"):
        Skeleton.open(source).load_block(0, source, device="cpu", dtype=torch.float32)


SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("config_class", "changes"),
    [
        ("Jais2Config", {}),
        ("NanoChatConfig", {"head_dim": 12, "num_key_value_heads": 2}),
        ("DiffLlamaConfig", {"num_key_value_heads": 2}),
    ],
)
def test_families_without_an_adapter(config_class, changes):
    config = getattr(transformers, config_class)(**{**SMALL, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = model.eval().requires_grad_(False).double()
    source = MemorySource(model)
    skeleton = Skeleton.open(source)
    ids_BT = random_ids(2, 9)
    assert torch.equal(run_by_blocks(skeleton, source, ids_BT), model(ids_BT).logits)
    assert skeleton.adapter.family == "generic"


@pytest.mark.parametrize(
    ("config_class", "changes"),
    [
        ("FalconConfig", {"head_dim": LEFT_OUT}),
        ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 24}),
        ("GPTNeoXConfig", {}),
        ("BloomConfig", {}),
    ],
    ids=["tuples", "projected embedding", "renamed head", "alibi"],
)
def test_blocks_of_other_forms(config_class, changes):
    given = {key: value for key, value in {**SMALL, **changes}.items() if value is not LEFT_OUT}
    config = getattr(transformers, config_class)(**given)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    source = MemorySource(model)
    skeleton = Skeleton.open(source)
    ids_BT = random_ids(2, 9)
    with torch.no_grad():
        outer = skeleton.load_outer(source, dtype=torch.float32)
        hidden_BTD = skeleton.embed(outer, ids_BT)
        for index in range(skeleton.num_blocks):
            block = skeleton.load_block(index, source, device="cpu", dtype=torch.float32)
            kwargs = skeleton.block_kwargs(index, hidden_BTD)
            hidden_BTD = run_block(block, hidden_BTD, kwargs)
        assert torch.equal(skeleton.logits(outer, hidden_BTD), model(ids_BT).logits)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.T5Config(), "cannot build the model: Unrecognized configuration class"),
    ],
    ids=["encoder-decoder"],
)
def test_other_kinds_of_model_are_refused(config, message):
    class ConfigOnly:
        pass

    source = ConfigOnly()
    source.config = config
    with pytest.raises(RotqError, match=message):
        Skeleton.open(source)


ROPE = {
    "dynamic": {"factor": 4.0},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0 + i for i in range(8)],
    },
}


@pytest.mark.parametrize("kind", ROPE)
def test_rotary_embeddings_that_depend_on_the_length(kind):
    """Of windows shorter and longer than the positions, in any order; the model is a fresh one."""
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **ROPE[kind]}
    model = tiny_model("llama")
    model.config.rope_parameters = parameters
    model.config.max_position_embeddings = 20
    source = MemorySource(model)
    skeleton = Skeleton.open(source)
    for length in (5, 40, 7, 90, 20, 17):
        fresh = transformers.AutoModelForCausalLM.from_config(
            model.config, dtype=torch.float64, attn_implementation="sdpa"
        ).eval()
        fresh.load_state_dict(model.state_dict())
        ids_BT = random_ids(2, length)
        with torch.no_grad():
            expected = fresh(ids_BT).logits
        difference = (run_by_blocks(skeleton, source, ids_BT) - expected).abs().max()
        assert difference < 1e-6, length
