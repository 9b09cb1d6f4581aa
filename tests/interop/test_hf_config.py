"""config.json to ModelConfig and back, and the tensor maps of all families, without loading weights."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from interop.families import FAMILIES, family_of, to_json
from interop.load import abstract, named
from interop.translate import IRRELEVANT, UnsupportedModelError, architecture, differences
from model.config import AttentionConfig, ModelConfig, NormConfig, PositionConfig, RopeScalingConfig, layer_specs
from model.positions import inverse_frequencies
from sharding.rules import ShardingRules
from tests.interop.hf_configs import RELEASES
from tests.parity.families import BY_NAME
from tests.parity.families import FAMILIES as TINY

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
NAMES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 40}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def small(family: str, **more: Any) -> dict[str, Any]:
    """Return a minimal config.json of a family, plus `more`."""
    return {"architectures": [NAMES[family]]} | (GPT2 if family == "gpt2" else SMALL) | more


def read(values: dict[str, Any]) -> ModelConfig:
    return family_of(values)[1]


# One config for each kind of tensor map. The parity tests check what the networks compute.
TABLES = {family.name: family.config for family in TINY} | {
    "gpt2_untied": small("gpt2", tie_word_embeddings=False, n_inner=40),
    "llama_biases": small("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=16),
    "qwen2_windows": small("qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=7),
    "gemma3_uneven": small("gemma3", num_hidden_layers=7, sliding_window_pattern=3),
}


@pytest.mark.parametrize("name", RELEASES)
def test_releases_have_their_published_parameter_count(name: str) -> None:
    release = RELEASES[name]
    family, config, left = family_of(release.values)
    assert (family, left) == (release.family, [])
    weights = named(abstract(config, ShardingRules(), None))
    assert sum(math.prod(weight.shape) for weight in weights.values()) == release.parameters


@pytest.mark.parametrize("name", RELEASES | TABLES)
def test_a_config_written_and_read_again_is_the_same_network(name: str) -> None:
    values = RELEASES[name].values if name in RELEASES else TABLES[name]
    family, config, _ = family_of(values)
    for wanted in (family, None):
        written, json = to_json(config, wanted)
        again, found, left = family_of(json)
        assert again == written == (wanted or written) and left == []
        assert differences(architecture(config), architecture(found)) == []


@pytest.mark.parametrize("name", TABLES)
def test_pieces_cover_each_tensor_and_weight_once(name: str) -> None:
    family, config, _ = family_of(TABLES[name])
    tensor_map = FAMILIES[family].tensor_map(config)
    weights = {path: np.zeros(leaf.shape, int) for path, leaf in named(abstract(config, ShardingRules(), None)).items()}
    tensors: dict[str, np.ndarray] = {}
    for entry in tensor_map:
        tensor = tensors.setdefault(entry.name, np.zeros(entry.shape, int))
        assert tensor.shape == entry.shape
        part = entry.part(tensor)
        assert part.shape == weights[entry.leaf][entry.at].shape
        part += 1  # a view of the tensor
        weights[entry.leaf][entry.at] += 1
    assert {path for path, count in weights.items() if not (count == 1).all()} == set()
    assert {tensor for tensor, count in tensors.items() if not (count == 1).all()} == set()
    assert config.tied_embeddings == ("lm_head.weight" not in tensors)


@pytest.mark.parametrize("name", TABLES)
def test_a_piece_written_is_read_back(name: str) -> None:
    family, config, _ = family_of(TABLES[name])
    rng = np.random.default_rng(0)
    for entry in FAMILIES[family].tensor_map(config):
        tensor = rng.random(entry.shape)
        part = entry.part(tensor).copy()
        written = np.zeros(entry.shape)
        entry.part(written)[...] = part
        np.testing.assert_array_equal(entry.part(written), part)
        assert (written == tensor).sum() >= part.size


def test_missing_keys_have_the_defaults_of_transformers() -> None:
    mistral, qwen3 = read(small("mistral", num_key_value_heads=4)), read(small("qwen3"))
    assert (mistral.attention.layers, mistral.attention.window, mistral.norm.epsilon) == (("sliding",), 4096, 1e-6)
    assert (qwen3.attention.head_dim, qwen3.attention.layers, qwen3.tied_embeddings) == (128, ("global",), False)
    assert read(small("olmo2")).norm.epsilon == 1e-5 and read(small("olmo2")).norm.placement == "post"
    bare = {k: v for k, v in small("mistral").items() if k not in ("num_key_value_heads", "max_position_embeddings")}
    assert (
        read(bare | {"num_attention_heads": 16}).attention.num_kv_heads == 8
        and read(bare | {"num_attention_heads": 16}).max_length == 131_072
    )
    assert read({k: v for k, v in small("llama").items() if k != "num_key_value_heads"}).attention.num_kv_heads == 4
    gemma = read({"architectures": ["Gemma2ForCausalLM"]})
    assert (gemma.attention.softcap, gemma.final_softcap, gemma.attention.query_scale, gemma.tied_embeddings) == (
        50,
        30,
        1 / 16,
        True,
    )
    text = read({"architectures": ["Gemma3ForCausalLM"]})
    assert (text.position.theta, text.position.local_theta, text.final_softcap) == (1e6, 1e4, None)
    assert [spec.attention for spec in layer_specs(text)].index("global") == 5
    assert read(small("gpt2")).mlp.hidden_dim == 128 and read(small("gpt2")).tied_embeddings


def test_null_is_not_missing() -> None:
    assert read(small("mistral", sliding_window=None)).attention.layers == ("global",)
    gemma = read(small("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None))
    assert gemma.attention.softcap is None and gemma.final_softcap is None


def test_layers_with_windows() -> None:
    def kinds(family: str, **more: Any) -> str:
        return "".join(spec.attention[0] for spec in layer_specs(read(small(family, **more))))

    assert kinds("qwen2", use_sliding_window=True, max_window_layers=3) == "gggs"
    assert kinds("qwen2", use_sliding_window=False, max_window_layers=0) == "gggg"
    assert kinds("qwen2", use_sliding_window=True, sliding_window=None, max_window_layers=0) == "gggg"
    assert kinds("qwen3", use_sliding_window=True, layer_types=["sliding_attention", "full_attention"] * 2) == "sgsg"
    assert kinds("gemma2") == "sgsg"
    assert kinds("gemma3") == "ssss" and kinds("gemma3", sliding_window_pattern=2) == "sgsg"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2"])
def test_both_spellings_of_rope_give_the_same_config(family: str) -> None:
    for parameters in (
        {"rope_type": "default"},
        YARN,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 3.0},
    ):
        old = read(small(family, rope_theta=500.0, rope_scaling=parameters))
        new = read(small(family, rope_parameters=parameters | {"rope_theta": 500.0}))
        assert old == new and old.position.theta == 500.0
    assert old.position.scaling == RopeScalingConfig("dynamic_ntk", 3.0, 64)
    assert read(small(family, rope_scaling={"type": "linear", "factor": 2})).position.scaling == RopeScalingConfig(
        "linear", 2.0
    )


def test_original_length_of_rope_scaling() -> None:
    """Dynamic scaling uses max_position_embeddings; the others use the original length, at either level of the file."""
    dynamic = small(
        "llama", rope_scaling={"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 16}
    )
    assert read(dynamic).position.scaling == RopeScalingConfig("dynamic_ntk", 3.0, 64)
    top_level = small("llama", rope_scaling={"rope_type": "yarn"}, original_max_position_embeddings=16)
    assert read(top_level).position == read(small("llama", rope_scaling=YARN)).position


def test_ntk_is_written_as_an_equivalent_larger_base() -> None:
    config = read(small("llama", rope_theta=100.0))
    ntk = replace(config, position=replace(config.position, scaling=RopeScalingConfig("ntk", 4.0)))
    found = read(to_json(ntk, "llama")[1])
    dim = config.attention.head_dim
    np.testing.assert_allclose(
        inverse_frequencies(dim, found.position.theta, None), inverse_frequencies(dim, 100.0, ntk.position.scaling)
    )


def test_rope_of_gemma_3_is_scaled_in_global_layers_only() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    old = read(small("gemma3", rope_theta=300.0, rope_local_base_freq=20.0, rope_scaling=linear))
    nested = {
        "full_attention": linear | {"rope_theta": 300.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    }
    assert old == read(small("gemma3", rope_parameters=nested))
    assert old.position == PositionConfig(theta=300.0, local_theta=20.0, scaling=RopeScalingConfig("linear", 8.0))
    both = {"full_attention": linear | {"rope_theta": 300.0}, "sliding_attention": linear | {"rope_theta": 300.0}}
    assert read(small("gemma3", rope_parameters=both)).position.local_theta is None


def test_text_config_of_a_multimodal_gemma_3_is_read() -> None:
    values = {k: v for k, v in small("gemma3", rms_norm_eps=1e-3, odd=1).items() if k != "architectures"}
    whole = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": values,
        "vision_config": {"a": 1},
        "even": 2,
    }
    before = copy.deepcopy(whole)
    family, config, left = family_of(whole)
    assert (family, left) == ("gemma3", ["even", "text_config.odd"]) and whole == before
    assert config == read(small("gemma3", rms_norm_eps=1e-3))
    assert to_json(config)[1]["architectures"] == ["Gemma3ForCausalLM"]


def test_tensors_of_older_files_are_renamed() -> None:
    gpt2 = FAMILIES["gpt2"].rename(
        ["wte.weight", "h.0.ln_1.bias", "ln_f.weight", "transformer.h.0.ln_2.bias", "lm_head.weight"]
    )
    assert gpt2 == {
        "wte.weight": "transformer.wte.weight",
        "h.0.ln_1.bias": "transformer.h.0.ln_1.bias",
        "ln_f.weight": "transformer.ln_f.weight",
    }
    layer = "layers.0.mlp.up_proj.weight"
    gemma = FAMILIES["gemma3"].rename(
        [f"language_model.model.{layer}", f"model.language_model.{layer}", f"model.{layer}", "vision_tower.x"]
    )
    assert gemma == {
        f"language_model.model.{layer}": f"model.{layer}",
        f"model.language_model.{layer}": f"model.{layer}",
    }


REFUSED = [
    ("llama", {"hidden_act": "gelu"}, ("hidden_act = 'gelu'", "'silu'", "'gelu_pytorch_tanh'")),
    ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ("rope_scaling", "'longrope'", "yarn")),
    (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}},
        ("low_freq_factor is missing",),
    ),
    ("llama", {"rope_scaling": YARN | {"short_factor": [1.0]}}, ("short_factor", "not supported")),
    (
        "llama",
        {"rope_scaling": YARN, "original_max_position_embeddings": 32},
        ("original_max_position_embeddings = 16", "32"),
    ),
    ("llama", {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 8.0}}, ("rope_parameters and rope_scaling",)),
    ("llama", {"rope_scaling": YARN | {"factor": 0.5}}, ("factor = 0.5",)),
    ("llama", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor = 0.5", "1.0")),
    ("llama", {"is_causal": False}, ("is_causal = False", "True")),
    ("llama", {"hidden_size": None}, ("hidden_size is missing",)),
    ("llama", {"hidden_size": "32"}, ("hidden_size = '32'", "integer")),
    ("llama", {"num_hidden_layers": 0}, ("num_hidden_layers = 0", "above 0")),
    ("llama", {"num_key_value_heads": 3}, ("num_kv_heads = 3", "divide")),
    ("llama", {"rms_norm_eps": float("nan")}, ("rms_norm_eps = nan", "finite")),
    ("llama", {"tie_word_embeddings": "yes"}, ("tie_word_embeddings = 'yes'", "true or false")),
    ("mistral", {"layer_types": ["full_attention"] * 4}, ("layer_types", "sliding_window = 4096")),
    ("qwen2", {"layer_types": ["sliding_attention"] * 4}, ("sliding_window = None",)),
    ("qwen2", {"layer_types": ["full_attention"] * 3}, ("3 entries for 4 layers",)),
    ("qwen2", {"layer_types": ["chunked_attention"] * 4}, ("'chunked_attention'", "full_attention")),
    ("qwen2", {"use_mrope": True}, ("use_mrope = True", "False")),
    ("gemma2", {"query_pre_attn_scalar": 0}, ("query_pre_attn_scalar = 0",)),
    ("gemma2", {"use_bidirectional_attention": True}, ("use_bidirectional_attention = True",)),
    ("gemma2", {"sliding_window": None}, ("sliding_window = None",)),
    ("gemma3", {"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping = 50.0", "None")),
    ("gemma3", {"rope_parameters": {"rope_type": "default"}}, ("rope_parameters", "full_attention")),
    (
        "gemma3",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        ("sliding_attention", "full_attention"),
    ),
    ("gpt2", {"activation_function": "gelu"}, ("activation_function = 'gelu'", "gelu_new")),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ("scale_attn_by_inverse_layer_idx = True",)),
    ("gpt2", {"scale_attn_weights": False}, ("scale_attn_weights = False",)),
    ("gpt2", {"add_cross_attention": True}, ("add_cross_attention = True",)),
    ("gpt2", {"n_head": 5}, ("n_embd = 32", "n_head = 5")),
]


@pytest.mark.parametrize(("family", "change", "parts"), REFUSED, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_unsupported_values_are_refused(family: str, change: dict[str, Any], parts: tuple[str, ...]) -> None:
    read(small(family))
    with pytest.raises(UnsupportedModelError) as error:
        read(small(family, **change))
    message = str(error.value)
    assert message.startswith("config.json") and "\n" not in message
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("named", [["BertModel"], "GPTNeoXForCausalLM", [], None, [["LlamaForCausalLM"]], 7])
def test_an_unsupported_architecture_lists_the_supported_ones(named: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel.*Gemma3ForCausalLM.*LlamaForCausalLM"):
        read(SMALL | {"architectures": named})


def test_unused_keys_are_reported() -> None:
    assert family_of(small("llama", residual_multiplier=0.2, use_cache=True, torch_dtype="float16", nothing=None))[
        2
    ] == ["residual_multiplier"]


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([10**400, -(10**30), 1e308]),
    st.floats(width=32),
    st.text(max_size=4),
    st.lists(st.one_of(st.integers(-1, 2), st.text(max_size=2), st.lists(st.integers(), max_size=1)), max_size=4),
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "full_attention", "x"]),
        st.one_of(st.none(), st.integers(), st.text(max_size=4)),
        max_size=2,
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_an_odd_value_is_read_or_refused_without_a_crash(data: st.DataObject) -> None:
    values = copy.deepcopy(TABLES[data.draw(st.sampled_from(sorted(TABLES)), "family")])
    where = values
    keys = sorted(values)
    for nested in ("rope_scaling", "rope_parameters"):
        if isinstance(values.get(nested), dict) and data.draw(st.booleans(), "nested"):
            where, keys = values[nested], sorted(values[nested])
    key = data.draw(
        st.sampled_from([*keys, "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "new_key"]), "key"
    )
    old, where[key] = where.get(key), data.draw(ODD, "value")
    try:
        family, config, left = family_of(values)
    except UnsupportedModelError as error:
        assert str(error).startswith("config.json") and len(str(error)) < 1000
        return
    config.validate()
    if where is values and key == "new_key" and where[key] is not None:
        assert left == ["new_key"]
    assert key not in IRRELEVANT or config == family_of(values | {key: old})[1]
    FAMILIES[family].tensor_map(config)


NETWORKS = st.builds(
    ModelConfig,
    vocab_size=st.integers(1, 99),
    num_layers=st.integers(1, 6),
    embed_dim=st.sampled_from([24, 32]),
    max_length=st.integers(8, 64),
    attention=st.builds(
        AttentionConfig,
        num_heads=st.sampled_from([4, 5]),
        num_kv_heads=st.just(1),
        head_dim=st.sampled_from([8, 6]),
        bias=st.sampled_from(["none", "qkv", "all"]),
        qk_norm=st.sampled_from(["none", "head", "full"]),
        softcap=st.sampled_from([None, 30.0]),
        query_scale=st.sampled_from([None, 0.25, 0.3]),
        layers=st.sampled_from([("global",), ("sliding",), ("sliding", "global"), ("block_sparse",)]),
        mask=st.sampled_from(["causal", "causal", "causal", "bidirectional"]),
    ),
    position=st.builds(
        PositionConfig,
        kind=st.sampled_from(["rope", "rope", "rope", "learned", "alibi"]),
        local_theta=st.sampled_from([None, 100.0]),
        scaling=st.one_of(
            st.none(),
            st.builds(
                RopeScalingConfig,
                st.sampled_from(["linear", "ntk", "dynamic_ntk", "yarn", "llama3"]),
                st.sampled_from([1.0, 4.0]),
                st.sampled_from([32, 64]),
                truncate=st.booleans(),
                attention_factor=st.sampled_from([None, 1.5]),
            ),
        ),
    ),
    norm=st.builds(
        NormConfig,
        st.sampled_from(["rmsnorm", "layernorm"]),
        epsilon=st.sampled_from([1e-6, 1e-3]),
        bias=st.booleans(),
        unit_offset=st.booleans(),
        placement=st.sampled_from(["pre", "post", "sandwich"]),
    ),
    tied_embeddings=st.booleans(),
    embedding_scale=st.sampled_from([None, math.sqrt(32)]),
    final_softcap=st.sampled_from([None, 20.0]),
)


@settings(max_examples=120, deadline=None)
@given(NETWORKS)
def test_any_network_is_written_exactly_or_refused(config: ModelConfig) -> None:
    try:
        _, values = to_json(config)
    except UnsupportedModelError as error:
        assert "which cannot express: " in str(error)
        return
    assert differences(architecture(config), architecture(read(values))) == []


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss"])
def test_a_window_is_written_even_if_no_layer_slides(name: str) -> None:
    """transformers does not accept null for these families."""
    config = read(BY_NAME[name].config)
    everywhere = replace(config, attention=replace(config.attention, layers=("global",)))
    if name == "gemma3":
        everywhere = replace(everywhere, position=replace(config.position, local_theta=None))
    _, values = to_json(everywhere, name)
    assert values["sliding_window"] == config.attention.window and set(values["layer_types"]) == {"full_attention"}
    assert differences(architecture(everywhere), architecture(read(values))) == []


def test_olmoe_requires_queries_as_wide_as_the_residual_stream() -> None:
    config = read(BY_NAME["olmoe"].config)
    assert to_json(config)[0] == "olmoe"
    wide = replace(config, attention=replace(config.attention, head_dim=16))
    with pytest.raises(
        UnsupportedModelError, match=r"head_dim = 16: .*embed_dim = 32 numbers, but 4 heads of 16 have 64"
    ):
        to_json(wide, "olmoe")


def test_dynamic_scaling_is_written_with_its_original_length() -> None:
    """max_position_embeddings is the original length for dynamic scaling, and model.max_length for other positions."""
    values = small("llama", rope_scaling={"rope_type": "dynamic", "factor": 3.0})
    longer = replace(read(values), max_length=256)
    written = to_json(longer)[1]
    assert written["max_position_embeddings"] == 64
    assert read(written).position == longer.position and architecture(read(written)) == architecture(longer)
    assert to_json(replace(read(small("llama")), max_length=256))[1]["max_position_embeddings"] == 256
    learned = read(BY_NAME["gpt2"].config)
    assert architecture(learned) != architecture(replace(learned, max_length=256))


def test_the_simplest_family_that_can_express_a_config_is_chosen() -> None:
    def chosen(**changes: Any) -> str:
        config = read(small("llama"))
        return to_json(replace(config, attention=replace(config.attention, **changes)))[0]

    assert chosen() == "llama"
    assert chosen(layers=("sliding",), window=9) == "mistral"
    assert chosen(bias="qkv") == "qwen2"
    assert chosen(qk_norm="head") == "qwen3"
    with pytest.raises(
        UnsupportedModelError, match=r"llama, which cannot express: model.attention.sinks = True \(there False\)"
    ):
        chosen(sinks=True)
    with pytest.raises(UnsupportedModelError, match=r"family = 'bert': unknown\. Supported: llama"):
        to_json(read(small("llama")), "bert")


def test_tables_and_releases_include_every_family() -> None:
    counted = Counter(family_of(values)[0] for values in TABLES.values())
    assert set(counted) == set(FAMILIES) == {release.family for release in RELEASES.values()}
