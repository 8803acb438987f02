"""The built-in models: counts, initial weights, canonical names and what each architecture promises."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from unitrain import registry
from unitrain.errors import RecipeError, UserError
from unitrain.models.config import GPT, MLP, SIZES, ConvNet
from unitrain.models.gpt_torch import RMSNorm, generate, rotated
from unitrain.models.initial import by_name, constant, normal

pytestmark = pytest.mark.fast

CONFIGS = [
    GPT(vocab_size=256),
    GPT(vocab_size=300, tied=False, layers=2),
    GPT(vocab_size=11, size="small", width=24, heads=2, ffn=40),
    MLP(),
    MLP(in_features=12, hidden=(), num_classes=3),
    ConvNet(),
    ConvNet(norm="batch", channels=12, depth=3, in_channels=3),
]
SMALL_GPT = GPT(vocab_size=17, layers=2, width=16, heads=2, ffn=24)


def build(config: Any, device: str = "cpu") -> nn.Module:
    with torch.device(device):
        return registry.resolve(config.modules["torch"])(config)


def filled(module: nn.Module, config: Any, seed: int = 0) -> nn.Module:
    """The module on the CPU, each parameter at its initial value."""
    module = module.to_empty(device="cpu")
    for name, tensor in module.named_parameters():
        tensor.data.copy_(torch.from_numpy(config.initial(name, tuple(tensor.shape), seed)))
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
    return module


def small_gpt(seed: int = 0, config: GPT = SMALL_GPT) -> nn.Module:
    return filled(build(config, "meta"), config, seed).eval()


# --- counts


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_configuration_counts_its_parameters_exactly(config):
    assert config.num_parameters() == sum(p.numel() for p in build(config, "meta").parameters())


@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("tied", [True, False])
def test_every_size_counts_its_parameters_exactly(size, tied):
    config = GPT(size=size, vocab_size=50257, tied=tied)
    assert config.num_parameters() == sum(p.numel() for p in build(config, "meta").parameters())


def test_sizes_are_what_their_names_say():
    count = {size: GPT(size=size, vocab_size=256).num_parameters() for size in SIZES}
    assert count["tiny"] == 994_400
    assert count["small"] == 14_260_608
    assert GPT(size="124m", vocab_size=50257).num_parameters() == 123_551_232
    assert count["1b"] == 1_028_212_736


def test_the_largest_size_can_be_built_without_memory():
    module = build(GPT(size="1b", vocab_size=256), "meta")
    assert all(p.is_meta for p in module.parameters())
    assert not list(module.buffers())


def test_flops_of_a_token_are_six_for_each_multiplied_weight_and_twelve_for_attention():
    tied = GPT(vocab_size=256)
    assert tied.flops_per_token(128) == 6 * tied.num_parameters() + 12 * 3 * 160 * 128
    # A separate embedding is looked up, not multiplied.
    untied = GPT(vocab_size=256, tied=False)
    assert untied.flops_per_token(128) == tied.flops_per_token(128)


# --- options


def test_single_dimensions_override_those_of_the_size():
    shape = GPT(size="small", layers=3, vocab_size=9).shape()
    assert (shape.layers, shape.width, shape.heads, shape.ffn) == (3, 384, 6, 1024)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": "huge"}, "model.size is 'huge'; it must be one of tiny, small, 124m, 1b"),
        ({"layers": 0}, "model.layers is 0"),
        ({"width": 100, "heads": 3}, "model.width is 100 and model.heads is 3"),
        ({"width": 12, "heads": 4}, "an even whole number"),
        ({"dropout": 1.0}, "model.dropout is 1.0"),
    ],
)
def test_an_impossible_gpt_is_refused_with_the_key_that_is_wrong(options, words):
    with pytest.raises(RecipeError, match=words):
        GPT(**options)


def test_impossible_classifiers_are_refused_with_the_key_that_is_wrong():
    with pytest.raises(RecipeError, match=r"model\.hidden\[1\] is 0"):
        MLP(hidden=[8, 0])
    with pytest.raises(RecipeError, match=r"model\.norm is 'layer'"):
        ConvNet(norm="layer")


def test_the_vocabulary_comes_from_the_data_unless_it_is_given():
    assert GPT().with_vocabulary(70).shape().vocab_size == 70
    assert GPT(vocab_size=128).with_vocabulary(70).shape().vocab_size == 128
    with pytest.raises(RecipeError, match=r"model\.vocab_size is 50, but the data has 70 tokens"):
        GPT(vocab_size=50).with_vocabulary(70)
    with pytest.raises(RecipeError, match=r"model\.vocab_size is null"):
        GPT().shape()


@pytest.mark.parametrize("kind", [GPT, MLP, ConvNet])
def test_every_option_carries_the_sentence_of_the_reference(kind):
    assert all(field.metadata["help"] for field in kind.__dataclass_fields__.values() if field.name != "modules")


# --- initial weights


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_every_parameter_has_an_initial_value_of_its_shape(config):
    module = build(config, "meta")
    for name, tensor in module.named_parameters():
        values = config.initial(name, tuple(tensor.shape), 0)
        assert values.shape == tuple(tensor.shape)
        assert values.dtype == np.float32


def test_initial_values_differ_by_name_and_seed_and_nothing_else():
    config, shape = GPT(vocab_size=256), (8, 16)
    first = config.initial("blocks.0.mlp.up.weight", shape, 3)
    assert (first == config.initial("blocks.0.mlp.up.weight", shape, 3)).all()
    assert (first != config.initial("blocks.1.mlp.up.weight", shape, 3)).all()
    assert (first != config.initial("blocks.0.mlp.up.weight", shape, 4)).all()


def test_initial_values_are_the_recorded_ones():
    # A change here means that old and new versions start from different models.
    embed = GPT(vocab_size=256).initial("embed.weight", (256, 160), 0)
    assert embed[0, :3].tolist() == [0.013424423523247242, 0.012102087028324604, -0.029744073748588562]
    layer = MLP().initial("layers.0.weight", (128, 64), 7)
    assert layer[0, :3].tolist() == [-0.2276383489370346, -0.1951669603586197, 0.11416129022836685]


def test_initial_values_have_the_spread_of_their_rule():
    config = GPT(size="124m", vocab_size=256)
    assert config.initial("embed.weight", (256, 768), 0).std() == pytest.approx(0.02, rel=0.02)
    residual = config.initial("blocks.3.mlp.down.weight", (768, 2048), 0)
    assert residual.std() == pytest.approx(0.02 / math.sqrt(2 * 12), rel=0.02)
    convolution = ConvNet(channels=64).initial("blocks.0.conv1.weight", (64, 64, 3, 3), 0)
    assert convolution.std() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)


def test_a_name_without_a_rule_is_an_error_that_names_it():
    rule = by_name({r"a\.weight": normal(1), "b": constant(0)})
    with pytest.raises(UserError, match=r"no initial value for 'a\.weights'"):
        rule("a.weights", (2,), 0)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_module_from_the_meta_device_equals_one_built_in_memory(config):
    born_on_meta, born_in_memory = (filled(build(config, device), config, 5) for device in ("meta", "cpu"))
    ours, theirs = born_on_meta.state_dict(), born_in_memory.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    x = torch.zeros(2, 6, dtype=torch.int64) if isinstance(config, GPT) else torch.ones(2, *sample_shape(config))
    assert torch.equal(born_on_meta.eval()(x), born_in_memory.eval()(x))


def sample_shape(config: Any) -> tuple[int, ...]:
    return (config.in_features,) if isinstance(config, MLP) else (config.in_channels, 8, 8)


def test_canonical_names_of_the_gpt_are_the_promised_ones():
    names = [name for name, _ in build(GPT(vocab_size=9, layers=1, tied=False), "meta").named_parameters()]
    assert names == [
        "embed.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.attention.qkv.weight",
        "blocks.0.attention.out.weight",
        "blocks.0.mlp_norm.weight",
        "blocks.0.mlp.gate.weight",
        "blocks.0.mlp.up.weight",
        "blocks.0.mlp.down.weight",
        "norm.weight",
        "head.weight",
    ]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_sharding_units_are_parts_of_the_module_that_do_not_overlap(config):
    module = build(config, "meta")
    units = module.sharding_units()
    within = [id(p) for unit in units for p in unit.parameters()]
    assert len(within) == len(set(within))
    assert set(within) <= {id(p) for p in module.parameters()}


# --- the GPT


def test_a_later_token_changes_no_earlier_logit():
    model, tokens = small_gpt(), torch.arange(10).reshape(1, 10)
    changed = tokens.clone()
    changed[0, 6] = 16
    before, after = model(tokens), model(changed)
    assert torch.equal(before[0, :6], after[0, :6])
    assert not torch.allclose(before[0, 6:], after[0, 6:])


def test_tokens_know_their_place():
    # Without positions, the last token sees the same bag of keys in any order.
    model = small_gpt(config=GPT(vocab_size=17, layers=1, width=16, heads=2, ffn=24))
    assert not torch.allclose(model(torch.tensor([[1, 2, 3, 4]]))[0, -1], model(torch.tensor([[3, 1, 2, 4]]))[0, -1])


def test_rotated_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(8), torch.randn(8)
    queries, keys = rotated(q.expand(12, 8), 100.0), rotated(k.expand(12, 8), 100.0)
    scores = queries @ keys.T
    for distance in (0, 1, 5):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))
    assert not torch.allclose(scores[0, 0], scores[5, 0])
    torch.testing.assert_close(queries.norm(dim=1), q.norm().expand(12))


def test_rotation_keeps_the_precision_of_its_input():
    assert rotated(torch.randn(4, 8, dtype=torch.bfloat16), 100.0).dtype == torch.bfloat16


def test_the_norm_is_computed_in_fp32():
    norm, x = RMSNorm(64, 1e-5), torch.full((64,), 300.0, dtype=torch.float16)  # 300 squared overflows fp16
    assert norm(x).dtype == torch.float16
    torch.testing.assert_close(norm(x), torch.ones(64, dtype=torch.float16))


def test_a_tied_model_has_one_table_that_learns_as_embedding_and_as_output():
    tied, untied = small_gpt(), small_gpt(config=GPT(vocab_size=17, layers=2, width=16, heads=2, ffn=24, tied=False))
    assert "head.weight" not in dict(tied.named_parameters())
    with torch.no_grad():
        untied.head.weight.copy_(untied.embed.weight)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(tied(tokens), untied(tokens))
    tied(tokens).square().sum().backward()
    untied(tokens).square().sum().backward()
    torch.testing.assert_close(tied.embed.weight.grad, untied.embed.weight.grad + untied.head.weight.grad)


def test_dropout_acts_in_training_only():
    model = small_gpt(config=GPT(vocab_size=17, layers=2, width=16, heads=2, ffn=24, dropout=0.5))
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_a_sequence_beyond_the_longest_is_refused():
    model = small_gpt(config=GPT(vocab_size=17, layers=1, width=16, heads=2, ffn=24, max_len=4))
    with pytest.raises(ValueError, match=r"5 tokens in a row, but model\.max_len is 4"):
        model(torch.zeros(1, 5, dtype=torch.int64))


def test_generation_follows_its_seed():
    model = small_gpt()
    first = generate(model, [1, 2], 12, 1.0, seed=3)
    assert first[:2] == [1, 2]
    assert len(first) == 14
    assert first == generate(model, [1, 2], 12, 1.0, seed=3)
    assert first != generate(model, [1, 2], 12, 1.0, seed=4)


def test_generation_at_temperature_zero_takes_the_likeliest_token():
    model = small_gpt()
    tokens = generate(model, [1, 2], 3, 0.0)
    assert tokens == generate(model, [1, 2], 3, 0.0, seed=9)
    for length in range(2, 5):
        assert tokens[length] == int(model(torch.tensor([tokens[:length]]))[0, -1].argmax())


def test_generation_sees_no_more_than_its_window():
    model = small_gpt()
    assert generate(model, [5, 1, 2], 4, 0.0, window=2)[3:] == generate(model, [9, 1, 2], 4, 0.0, window=2)[3:]


# --- the classifiers


def test_group_norm_gives_a_sample_the_same_result_in_any_batch():
    config = ConvNet()
    model = filled(build(config, "meta"), config)
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 8, 8), dtype=np.float32))
    torch.testing.assert_close(model(images), torch.cat([model(images[:2]), model(images[2:])]))


def test_batch_norm_does_not_and_keeps_statistics():
    config = ConvNet(norm="batch")
    model = filled(build(config, "meta"), config)
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 8, 8), dtype=np.float32))
    assert not torch.allclose(model(images), torch.cat([model(images[:2]), model(images[2:])]))
    assert model.norm.num_batches_tracked == 3


def test_a_single_channel_may_be_left_out_of_the_shape():
    config = ConvNet()
    model = filled(build(config, "meta"), config)
    images = torch.ones(2, 8, 8)
    assert torch.equal(model(images), model(images.unsqueeze(1)))


def test_the_mlp_takes_samples_of_any_arrangement():
    config = MLP()
    model = filled(build(config, "meta"), config)
    images = torch.ones(2, 8, 8)
    assert torch.equal(model(images), model(images.reshape(2, 64)))
