"""A layer serves rows if it knows whose they are, and refuses the rest before it computes."""

import copy

import pytest
import torch
import transformers
from torch import nn

from lora_kernels.serving import rows_of, unserve
from tests.integrations.fuse_helpers import llama
from tests.serving.merged import assert_rows_are, serve_two
from tests.serving.pools import net
from tests.serving.served import tokens

NAMES = ["a", "b", None, "a"]


class Net(nn.Module):
    """Two layers around which sequences are arranged in one way or another."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.shared = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 16)
        self.queries, self.arranged = nn.Parameter(torch.randn(4, 16)), forward

    def mlp(self, x):
        return self.b(self.a(x).relu())

    def forward(self, x):
        return self.arranged(self, x)


def doubled(net, x):
    """Classifier-free guidance, inside."""
    one, other = net.mlp(torch.cat([x, 0.5 * x])).chunk(2)
    return one + 2 * other


def expanded(net, x):
    y = net.mlp(x.repeat_interleave(3, 0))
    return y.view(-1, 3, *y.shape[1:]).sum(1)


def flat(net, x):
    return net.mlp(x.reshape(-1, 16)).view(x.shape)


def flat_by_position(net, x):
    y = net.mlp(x.transpose(0, 1).reshape(-1, 16))
    return y.view(x.shape[1], x.shape[0], 16).transpose(0, 1)


def position_first(net, x):
    return net.mlp(x.transpose(0, 1)).transpose(0, 1)


def learned_queries(net, x):
    return net.shared(net.queries.expand(len(x), -1, -1)) + net.mlp(x).mean(1, keepdim=True)


def pooled(net, x):
    return net.mlp(x.mean(1))


def shared_positions(net, x):
    return net.mlp(x) + net.shared(net.queries).sum(0)


def mixed(net, x):
    return net.mlp(x - x.mean(0, keepdim=True))


def sorted_by_size(net, x):
    order = x.flatten(1).sum(1).argsort()
    return net.mlp(x[order])[order.argsort()]


def packed(net, x):
    y, kept = torch.zeros_like(x), x.sum(-1) > -2
    y[kept] = net.mlp(x[kept])
    return y


@pytest.mark.parametrize("length", [4, 6])
@pytest.mark.parametrize("arranged", [doubled, expanded, flat, flat_by_position, position_first, learned_queries, pooled])
def test_rows_that_are_sequences_in_any_order(arranged, length):
    """Also where a dimension happens to be as long as there are sequences."""
    model = Net(arranged)
    _, models = serve_two(model)
    for seed in range(2):
        x = torch.randn(4, length, 16, generator=torch.Generator().manual_seed(seed))
        y = model(x, adapters=NAMES)
        assert_rows_are(y, NAMES, models, x)


@pytest.mark.parametrize("length", [4, 6])
@pytest.mark.parametrize(
    "arranged, why",
    [
        (shared_positions, "shared with an input of .4, 16.: it sees what all sequences share"),
        (mixed, "its rows are in no order of sequences"),
        (sorted_by_size, "its rows are in no order of sequences"),
        (packed, "must be the 4 sequences × . tokens|in no order of sequences"),
    ],
)
def test_rows_that_are_nobodys(arranged, why, length):
    """Refused, unless all requests want the same, or nobody an adapter of that layer."""
    model = Net(arranged)
    pool, models = serve_two(model)
    x = torch.randn(4, length, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=why):
        model(x, adapters=NAMES)
    assert pool.stats().in_use == 0
    y = model(x, adapters=["b"] * 4)
    torch.testing.assert_close(y.double(), models["b"](x.double()), rtol=1e-4, atol=1e-4)
    assert model(x, adapters=[None] * 4).equal(model(x))
    model = Net(shared_positions)
    _, models = serve_two(model, modules=("a", "b"))
    assert_rows_are(model(x, adapters=NAMES), NAMES, models, x)


class PositionFirst(nn.Module):
    """As torch's own recurrent and attention layers, where they are not told otherwise."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def by_position(model, x):
    return model(x.transpose(0, 1)).transpose(0, 1)


def test_rows_by_hand():
    """x [positions, sequences, in] is not sequences first: refused, and right with rows."""
    model = PositionFirst()
    pool, models = serve_two(model)
    for length in (4, 6):
        x = torch.randn(length, 4, 16)
        with pytest.raises(ValueError, match=r"4 were given, for 6 sequences|in no order of sequences"):
            model(x, adapters=NAMES)
        with pool.batch(NAMES, rows=[0, 1, 2, 3] * length):
            y = model(x)
        assert_rows_are(y.transpose(0, 1), NAMES, models, x.transpose(0, 1), call=by_position)
    x, layer = torch.randn(5, 16), model.head
    with pool.batch(["a", "b"], rows=torch.tensor([1, -1, 0, 0, 1])):
        y = layer(x)
        assert layer(x[:, None].expand(5, 2, 16))[:, 1].allclose(y, atol=1e-5)
        with pytest.raises(ValueError, match=r"head with an input of \[3, 16\]: rows= has 5 entries"):
            layer(x[:3])
        with rows_of([0, 0, 1]):
            again = layer(x[:3])
    wanted = ["b", None, "a", "a", "b"]
    assert_rows_are(y, wanted, models, x, call=lambda of, x: of.head(x))
    assert_rows_are(again, ["a", "a", "b"], models, x, call=lambda of, x: of.head(x))
    for wrong, error in (([0, 2], ValueError), ([-2], ValueError), ([0.5], TypeError), ([[0]], TypeError), ([True], TypeError)):
        with pytest.raises(error, match="rows must be"):
            pool.batch(["a", "b"], rows=wrong)
    assert pool.stats().in_use == 0


def test_one_adapter_for_each_sequence():
    """Fewer or more are refused at the door, whatever they are; a prompt before its beams."""
    model = llama().eval()
    pool, models = serve_two(model)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    for count, names in ((1, 2), (4, 2), (2, 4), (3, 2), (2, 1), (4, 1)):
        for given in (["a"] * names, (["a", "b"] * 2)[:names]):
            with pytest.raises(
                ValueError, match=rf"adapters: {names} were given, for {count} sequences \(input_ids \[{count}, 8\]\)"
            ):
                model(input_ids=tokens(count, 8), adapters=given)
            with pytest.raises(ValueError, match=f"adapters: {names} were given, for a prompt of {count} sequences"):
                model.generate(tokens(count, 8), adapters=given, num_beams=2, **options)
            with pool.batch(given), pytest.raises(ValueError, match=f"{names} were given, for {count} sequences"):
                model(tokens(count, 8))
    x = tokens(3, 3)  # as many tokens as sequences
    y = model(x, adapters=["a", None, "b"]).logits
    assert_rows_are(y, ["a", None, "b"], models, x, call=lambda of, x: of(x).logits)
    found = model.generate(x, adapters=["a", None, "b"], num_beams=4, num_return_sequences=2, **options)
    for i, name in enumerate(("a", None, "b")):
        wanted = models[name].generate(x[i : i + 1], num_beams=4, num_return_sequences=2, **options)
        assert found[2 * i : 2 * i + 2].equal(wanted)
    assert model.generate(x, adapters=["a", None, "b"], num_return_sequences=2, **{**options, "do_sample": True}).shape == (
        6,
        6,
    )


def test_encoder_and_decoder():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    _, models = serve_two(model, modules=("q", "k", "v", "o", "wi", "wo"))
    x, options = tokens(2, 6), {"max_new_tokens": 4, "do_sample": False, "num_beams": 3}
    y = model(input_ids=x, decoder_input_ids=x[:, :2], adapters=["a", "b"]).logits
    assert_rows_are(y, ["a", "b"], models, x, call=lambda of, x: of(input_ids=x, decoder_input_ids=x[:, :2]).logits)
    found = model.generate(x, adapters=["a", "b"], **options)
    for i, name in enumerate(("a", "b")):
        wanted = models[name].generate(x[i : i + 1], **options)[0]
        assert found[i, : len(wanted)].equal(wanted)


def test_positions_that_sequences_share():
    """DeBERTa gives relative positions to the layers that see the tokens."""
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        relative_attention=True, position_buckets=8, share_att_key=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0,
    )  # fmt: skip
    model = transformers.DebertaV2Model(config)
    _, models = serve_two(model, modules=("query_proj", "key_proj", "value_proj"))
    for length in (12, 16):
        x = tokens(2, length)
        with pytest.raises(ValueError, match="query_proj with an input of .*: it sees what all sequences share"):
            model(input_ids=x, adapters=["a", "b"])
        y = model(input_ids=x, adapters=["a", "a"]).last_hidden_state
        assert_rows_are(y, ["a", "a"], models, x, call=lambda of, x: of(input_ids=x).last_hidden_state)


def test_images_are_one_for_each_sequence():
    """Or nobody knows which sequence an image belongs to."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(vocab_size=64, **sizes), image_token_index=63, vision_feature_layer=-1,
        vision_config=transformers.CLIPVisionConfig(image_size=16, patch_size=8, **sizes),
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    _, models = serve_two(model)
    x, images = tokens(2, 10) % 60, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x[:, 1:5] = 63
    y = model(input_ids=x, pixel_values=images, adapters=["a", "b"]).logits
    call = lambda of, x, images: of(input_ids=x, pixel_values=images).logits  # noqa: E731
    assert_rows_are(y, ["a", "b"], models, x, images, call=call)
    x[0, :8], x[1] = 63, 5
    with pytest.raises(ValueError, match="vision_tower.*images or sounds are not one for each sequence"):
        model(input_ids=x, pixel_values=images, adapters=["a", "b"])
    y = model(input_ids=x, pixel_values=images, adapters=["a", "a"]).logits
    assert_rows_are(y, ["a"], models, x, images[None], call=lambda of, x, images: call(of, x, images[0]))


def test_a_model_of_images():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    model = transformers.ViTForImageClassification(config)
    _, models = serve_two(model)
    x = torch.randn(5, 3, 16, 16)  # as many patches, with the first token
    y = model(pixel_values=x, adapters=[*NAMES, "b"]).logits
    assert_rows_are(y, [*NAMES, "b"], models, x, call=lambda of, x: of(pixel_values=x).logits)


def test_a_model_that_cannot_be_tried():
    """A refusal says what it raised on other sequences."""

    class Picky(Net):
        def forward(self, x, cache):
            if len(x) == 3:
                raise ArithmeticError("three")
            return self.mlp(x)

    model = Picky(None)
    _, models = serve_two(model)
    x = torch.randn(4, 6, 16)
    assert_rows_are(model(x, None, adapters=NAMES), NAMES, models, x, call=lambda of, x: of(x, None))
    with pytest.raises(ValueError, match="may be sequences or others; nothing was learned.* ArithmeticError: three"):
        model(x[:, :4], None, adapters=NAMES)


def test_a_copy_is_nobodys():
    """It runs its own layers, and takes no adapters of the pool."""
    model = llama().eval()
    pool, _ = serve_two(model)
    twin, x = copy.deepcopy(model), tokens(2)
    twin.lm_head.weight.data.mul_(2)
    torch.testing.assert_close(twin(x).logits, 2 * model(x).logits)
    with pytest.raises(RuntimeError, match="adapters: this is a copy of a served model"):
        twin(x, adapters=["a", None])
    assert type(unserve(twin).lm_head) is nn.Linear and pool.stats().in_use == 0


def test_two_served_models():
    """A batch is of one pool: the other's layers do not see it."""
    one, other = net(), net()
    pool, _ = serve_two(one)
    serve_two(other)
    x = torch.randn(2, 24)
    plain = other(x)
    with pool.batch(["a", "b"]):
        assert other(x).equal(plain) and not one(x).equal(plain)
        assert other(x, adapters=["a", "b"]).equal(one(x))


def test_compiled_for_one_batch_and_another():
    model = net()
    pool, _ = serve_two(model)
    compiled, x = torch.compile(model, backend="eager"), torch.randn(2, 24)
    for names in (["a", "b"], ["b", "a"], [None, "a"], [None, None]):
        with pool.batch(names):
            torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x), model(x))


def test_layers_that_shrink_what_they_see():
    """Rows of different sequences are nearly equal in the last layers, and yet not shared."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16) for _ in range(6)]
    model = nn.Sequential(*layers).requires_grad_(False)
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.02)
    _, models = serve_two(model)
    x = torch.randn(4, 5, 16)
    assert_rows_are(model(x, adapters=NAMES), NAMES, models, x)


def test_rows_of_features_may_all_be_of_one_request():
    model = net()
    _, models = serve_two(model)
    x = torch.randn(3, 24)
    torch.testing.assert_close(model(x, adapters=["a"]).double(), models["a"](x.double()), rtol=1e-4, atol=1e-4)
    for wrong in (["a", "b"], ["a"] * 4):
        with pytest.raises(ValueError, match=f"{len(wrong)} were given, for 3 sequences"):
            model(x, adapters=wrong)
