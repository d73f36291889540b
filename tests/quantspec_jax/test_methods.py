"""Methods that compress a cache: what their papers promise, and the harness that compares them."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

import quantspec_jax as qs
from pallas_kernels.rope_append.heads import rotate, unrotated
from quantspec_jax import cli, evaluate
from quantspec_jax.evaluate.gradients import loss_gradients
from quantspec_jax.evaluate.learned import whole_tables
from quantspec_jax.loading import Model
from quantspec_jax.methods import (
    METHODS,
    Aqua,
    Higgs,
    Kivi,
    Layer,
    Planes,
    Streaming,
    aqua,
    higgs,
    kivi,
)
from quantspec_jax.models.attention import causal_attention
from quantspec_jax.models.decoder import forward, unembed
from quantspec_jax.models.presets import PRESETS
from quantspec_jax.models.rope import rope_frequencies, rope_tables
from quantspec_jax.weights.formats import DraftConfig

G = 32


def error(found, exact) -> float:
    """‖x − x̂‖² / ‖x‖²."""
    return float(((found - exact) ** 2).sum() / (exact**2).sum())


@pytest.mark.parametrize(
    ("width", "expected", "unturned"),
    [(2, 0.1050, 0.263), (3, 0.0289, 0.146), (4, 0.0076, 0.098)],
)
def test_higgs_errs_as_its_grid_does_on_numbers_of_any_kind(width, expected, unturned):
    """Heavy tails become nearly normal in the rotation; without it they err far more."""
    x = jnp.asarray(np.random.default_rng(13).standard_t(3, (32, 1024)), jnp.float32)
    assert error(higgs.rounded(x, width), x) == pytest.approx(expected, rel=0.03)
    turned = higgs._product(x, jnp.asarray(higgs.hadamard(1024)))  # and back: as it is
    assert error(higgs.rounded(turned, width), turned) == pytest.approx(unturned, rel=0.05)


@pytest.mark.parametrize(("width", "squared"), [(2, 0.1079), (3, 0.02958), (4, 0.00773)])
def test_grids_are_the_best_for_normal_pairs(width, squared):
    """The authors' grids err by `squared` a value; another optimum may differ a little."""
    points = higgs.grid(width)
    assert points.shape == (4**width, 2)
    x = np.random.default_rng(0).standard_normal((200_000, 2)).astype(np.float32)
    nearest = np.asarray(higgs._nearest(jnp.asarray(x), jnp.asarray(points)))
    assert ((x - points[nearest]) ** 2).mean() == pytest.approx(squared, rel=0.015)


def test_the_rotation_is_its_own_inverse_and_a_block_divides_the_channels():
    for order in (1, 2, 64, 1024):
        turn = higgs.hadamard(order)
        np.testing.assert_allclose(turn @ turn, np.eye(order), atol=1e-5)
    assert [higgs.block_of(n) for n in (192, 256, 1024, 4096)] == [64, 256, 1024, 1024]
    assert not higgs.rounded(jnp.zeros((2, 64)), 2).any()


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.1559), (4, 0.00600)])
def test_kivi_keys_by_channel(bits, expected):
    x = np.random.default_rng(7).standard_normal((2, 256, 64))
    x[:, :, 5] *= 8
    keys = jnp.asarray(x, jnp.float32)
    found = kivi.rounded(keys, bits, 32, 1)
    assert error(found, keys) == pytest.approx(expected, rel=0.01)
    groups = x.reshape(2, 8, 32, 64)
    step = (groups.max(2) - groups.min(2)) / (2**bits - 1)
    off = np.abs(np.asarray(found, np.float64) - x).reshape(groups.shape).max(2)
    assert (off <= step / 2 + 2e-3 * np.abs(groups).max(2)).all()  # ends are float16
    if bits == 2:  # a token's channels share no scale
        assert error(kivi.rounded(keys, 2, 32, 2), keys) == pytest.approx(0.2945, rel=0.01)


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.1546), (4, 0.00610)])
def test_kivi_values_by_token(bits, expected):
    x = jnp.asarray(np.random.default_rng(8).standard_normal((2, 256, 64)), jnp.float32)
    assert error(kivi.rounded(x, bits, 32, 2), x) == pytest.approx(expected, rel=0.01)


def test_kivi_keeps_constant_groups_and_a_last_group_of_its_own_size():
    constant = jnp.full((40, 2, 8), 1.5)
    found = Kivi(2).read((), Layer(constant, constant), None)
    for x in found:
        np.testing.assert_array_equal(x, constant)


def chain(layers: int, rows: int, n: int = 32) -> list[np.ndarray]:
    """k_l = k_{l−1} A + 0.3 ε."""
    rng = np.random.default_rng(19)
    a = rng.standard_normal((n, n)) * np.sqrt(0.81 / n)
    keys = [rng.standard_normal((rows, n))]
    for _ in range(layers - 1):
        keys.append(keys[-1] @ a + 0.3 * rng.standard_normal((rows, n)))
    return [x.astype(np.float32) for x in keys]


def test_aqua_stores_what_the_layer_below_does_not_predict():
    """The error is that of HIGGS times the share that the prediction leaves; it does not add up."""
    method, below = Aqua(2), None
    for x, unpredicted in zip(chain(4, 5000), (None, 0.106, 0.126, 0.132), strict=True):
        text = Layer(*(jnp.asarray(x)[:, None] for _ in range(2)))
        learned, made = method.fit(text, below)
        if below is not None:
            inputs = below.keys[:, 0]
            left = error(aqua._predicted(learned.of_keys, inputs), text.keys[:, 0])
            assert left == pytest.approx(unpredicted, rel=0.05)
            alone = error(higgs.rounded(text.keys[:, 0], 2), text.keys[:, 0])
            assert alone == pytest.approx(0.1015, rel=0.02)
            assert error(made.keys, text.keys) == pytest.approx(left * alone, rel=0.02)
        again = method.read(learned, text, below)
        for a, b in zip(made, again, strict=True):  # who reads sees what who wrote saw
            np.testing.assert_array_equal(a, b)
        below = made


def test_aqua_that_predicts_nothing_is_higgs():
    x = jax.random.normal(jax.random.key(0), (20, 2, 32))
    text = Layer(x, 2 * x)
    nothing = aqua.Predictors(jnp.zeros((65, 64)), jnp.zeros((129, 64)))
    found = Aqua(3).read(nothing, text, text)
    for a, b in zip(found, Higgs(3).read((), text, None), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bits_count_everything():
    model = PRESETS["smollm2-135m"]
    count = {name: METHODS[name].bits(model, 131072) for name in METHODS}
    assert count["kivi-2"] == 3.0
    assert count["higgs-2"] == 2.25
    predictors = 16 * 29 * (3 * 192**2 + 2 * 192) / (2 * 192 * 30 * 131072)
    assert count["aqua-2"] == pytest.approx((4.25 + 29 * 2.25) / 30 + predictors)
    assert count["int4"] < count["int8"] < count["full"] == 16


def test_rope_is_undone_with_an_attention_factor_too():
    config = PRESETS["smollm2-135m"]
    frequencies, _ = rope_frequencies(config.rope, 64, 100)
    cos, sin = rope_tables(frequencies, 1.3, jnp.arange(9)[None])
    x = jax.random.normal(jax.random.key(1), (1, 9, 2, 64))
    np.testing.assert_allclose(unrotated(rotate(x, cos, sin), cos, sin), x, atol=1e-5)


def test_gradients_come_down_a_block_at_a_time():
    """As the gradient of the whole model's loss at shifts of its keys and values."""
    config, params, _ = tiny_model()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (1, 12)))
    shape = (1, 12, config.num_kv_heads, config.head_dim)

    def loss(shifts):
        def attend(i, heads):
            q, k, v = heads.finished()
            keys, values = shifts[i]
            return causal_attention(q, k + keys, v + values, config.head_dim**-0.5), i

        layers, rope = range(config.num_layers), whole_tables(config, 12)
        hidden, _ = forward(params, config, tokens, rope, layers, attend, backend="xla")
        log_probs = jax.nn.log_softmax(unembed(params, hidden[0, :-1], "xla"))
        return -jnp.take_along_axis(log_probs, tokens[0, 1:, None], 1).sum()

    shifts = [(jnp.zeros(shape), jnp.zeros(shape))] * config.num_layers
    expected = jax.jit(jax.grad(loss))(shifts)
    found = loss_gradients(Model(config, params, draft=DraftConfig(bits=None)), np.asarray(tokens))
    cos, sin = whole_tables(config, 12)
    for layer, (keys, values) in zip(found, expected, strict=True):
        for a, b in zip(layer, (rotate(keys, cos, -sin), values), strict=True):
            scale = float(jnp.abs(b).max())
            np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.01 * scale)


@pytest.fixture(scope="module")
def model(tiny_llama_dir):
    return qs.load(tiny_llama_dir, dtype="float32", draft=DraftConfig(bits=None))


@pytest.fixture(scope="module")
def ids(model):
    return np.random.default_rng(3).integers(0, model.config.vocab_size, 6 * G).tolist()


def test_own_views_are_measured_as_elsewhere(model, ids):
    """As the cache that is decoded from and as a draft's, the same figures as those of `quantspec
    eval perplexity` and `acceptance`."""
    views = ("full", "int8", "int4", "int4-first8")
    found = {row["codec"]: row for row in evaluate.codecs(model, ids, views, group_size=G)["rows"]}
    expected = evaluate.perplexity(model, ids, group_size=G)
    for view in views[:3]:
        assert found[view]["perplexity"] == pytest.approx(expected["perplexity"][view], rel=1e-5)
    assert found["full"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["full"]["top1"] == 1
    draft = evaluate.acceptance(model, ids, group_size=G)
    for name in ("greedy_acceptance", "sampled_acceptance"):
        assert found["int8"][name] == pytest.approx(1, abs=1e-5)
        # A draft reads the first tile with both planes.
        assert found["int4-first8"][name] == pytest.approx(draft[name], rel=1e-5)
    assert found["int4"]["kl"] > found["int8"]["kl"] > 0


def test_places_are_counted_together(model, ids):
    """Each is read by itself, and the mean is over the positions of all."""

    def read(some, **options):
        found = evaluate.codecs(model, some, ("int4",), group_size=G, **options)
        return found["rows"][0]

    other = ids[::-1]
    alone = [read(some) for some in (ids, other)]
    both = read(ids + other + ids[:5], context=len(ids), places=2)
    assert both["positions"] == 2 * alone[0]["positions"] == 2 * (len(ids) - len(ids) // 4)
    for name in ("perplexity", "over_full"):
        each = [place[name] for place in both["by_place"]]
        assert each == pytest.approx([row[name] for row in alone])
    for name in ("kl", "top1", "greedy_acceptance", "sampled_acceptance"):
        assert both[name] == pytest.approx(np.mean([row[name] for row in alone]), rel=1e-5)
    product = alone[0]["perplexity"] * alone[1]["perplexity"]
    assert both["perplexity"] == pytest.approx(product**0.5)
    assert 0 < both["over_full_error"] < 1
    with pytest.raises(ValueError, match=f"tokens is '{2 * len(ids)} tokens'; allowed: "):
        read(ids + other, context=len(ids), places=3)


def test_positions_that_are_alike_count_once_in_the_standard_error():
    """Of independent numbers it is σ/√n; where 16 neighbours are the same, as of n/16."""
    x = np.random.default_rng(0).normal(size=4096)
    error = evaluate.codecs.__globals__["standard_error"]
    assert error([x[:2048], x[2048:]], 16) == pytest.approx(1 / 64, rel=0.1)
    repeated = np.repeat(x[:256], 16)
    assert error([repeated], 16) == pytest.approx(1 / 16, rel=0.1)
    assert error([x[:31]], 16) is None


def test_methods_are_ranked_by_their_bits(model, ids, monkeypatch):
    chunks = np.random.default_rng(4).integers(0, model.config.vocab_size, (4, 96))
    module = evaluate.codecs.__globals__
    monkeypatch.setitem(module, "calibration_tokens", lambda *_, **__: chunks.astype(np.int32))
    names = ("aqua-4", "aqua-2", "kivi-4", "kivi-2")
    rows = {row["codec"]: row for row in evaluate.codecs(model, ids, names, group_size=G)["rows"]}
    for name in ("aqua", "kivi"):
        fine, coarse = rows[f"{name}-4"], rows[f"{name}-2"]
        assert fine["kl"] < coarse["kl"]
        assert fine["sampled_acceptance"] > coarse["sampled_acceptance"]


def test_every_kind_of_method_goes_through_the_harness(model, ids):
    """Whoever reads all reads as the 8-bit view; what reads two layers together is a draft alone;
    selections count from the half."""
    names = ("streaming-25", "think-40", "calibquant-2", "lorc-75", "kvsharer-25", "minicache")
    whole = {"all": Streaming(1.0)}
    module = evaluate.codecs.__globals__
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module, "METHODS", {name: METHODS[name] for name in (*names, "int8")} | whole)
        patch.setitem(
            module,
            "calibration_tokens",
            lambda *_, **__: np.random.default_rng(4).integers(0, 300, (4, 64)).astype(np.int32),
        )
        found = evaluate.codecs(model, ids, ("all", "int8", *names), group_size=G)["rows"]
    rows = {row["codec"]: row for row in found}
    assert rows["all"]["sampled_acceptance"] == pytest.approx(1, abs=1e-5)
    assert rows["all"]["counted_from"] == len(ids) // 2
    assert rows["int8"]["counted_from"] == len(ids) // 4
    for name in names:
        assert 0 < rows[name]["sampled_acceptance"] <= 1 + 1e-6
        assert rows[name]["read_bits"] > 0
        assert all(speed > 0 for speed in rows[name]["speed_up"].values())
    assert rows["streaming-25"]["sampled_acceptance"] < rows["think-40"]["sampled_acceptance"] < 1
    assert rows["streaming-25"]["read_bits"] == pytest.approx(rows["int8"]["bits"] / 4)


def test_the_first_tile_alone_may_be_finer():
    x = jax.random.normal(jax.random.key(0), (3 * G, 2, 32))
    text = Layer(x, -x)

    def read(*view):
        return jax.jit(lambda text: Planes(*view, group_size=G).read((), text, None))(text)

    found = read("int4", 1)
    for view, part in (("int8", slice(None, G)), ("int4", slice(G, None))):
        expected = read(view)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a[part], b[part])


def test_command(tmp_path, monkeypatch, tiny_llama_dir, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUANTSPEC_CACHE_DIR", "")
    (tmp_path / "book.txt").write_text("The cache is stored once, in two planes. " * 9)
    arguments = ["eval", "codecs", "--model", str(tiny_llama_dir), "--text", "book.txt"]
    arguments += ["--context", "64", "--codec", "int8", "kivi-2", "--output", "out.json"]
    arguments += ["--kv-text", str(tmp_path / "book.txt")]
    assert cli.main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["codec"] for row in printed["rows"]] == ["int8", "kivi-2"]
    recorded = json.loads((tmp_path / "out.json").read_text())
    assert recorded["rows"] == printed["rows"]
    assert recorded["command"].endswith("--kv-text book.txt"), "files by name, not by place"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["codecs", "--codec", "gzip"], "--codec is 'gzip'; allowed: full, int8"),
        (["perplexity", "--codec", "int8"], "--codec cannot go with perplexity"),
        (["acceptance", "--kv-text", "book.txt"], "--kv-text cannot go with acceptance"),
        (["codecs", "--sweep"], "--sweep cannot go with codecs"),
        (["quality", "--places", "2"], "--places cannot go with quality"),
        (["codecs", "--places", "0"], "--places is 0; allowed: 1 or more"),
    ],
)
def test_wrong_options_are_named_before_loading(options, words, capsys):
    arguments = ["eval", *options, "--model", "nowhere", "--text", "no.txt", "--context", "64"]
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err
