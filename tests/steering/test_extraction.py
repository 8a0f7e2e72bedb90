"""mean_diff equals a mean by hand over separate unpadded passes, and finds a direction planted in a model."""

import numpy as np
import pytest
import torch
from steered_runs import PAD, SITES, STEERED_FAMILIES, blocks_of, engine_of, hook_count, plain_pass
from tiny_models import D_MODEL, N_BLOCKS, prompt_ids, tiny_model, tiny_tokenizer

import nblens
from nblens import UserError
from nblens.model.generation import Batch
from nblens.runtime.backend import Control
from nblens.runtime.engine import Engine
from nblens.specs import ExtractionSpec
from nblens.steering.extraction import METHODS, best_block, read_weights

LENGTHS = ((4, 7), (9, 3), (5, 5), (12, 4), (3, 8), (6, 6), (8, 11))  # tokens of the two texts of each pair


def pairs_of(lengths=LENGTHS):
    """(positive texts, negative texts) as token ids."""
    return tuple(
        tuple(tuple(prompt_ids(pair[side], seed=2 * i + side)) for i, pair in enumerate(lengths)) for side in (0, 1)
    )


def extracted(engine, positive, negative, control=None, **spec):
    events = []
    engine.run(ExtractionSpec(positive, negative, **spec), events.append, control or Control())
    (event,) = events
    return event


def states_by_hand(family, text, read, site, model=None):
    """(n_blocks, d_model) from one unpadded forward pass over one text."""
    model = model or engine_of(family).model
    hidden = plain_pass(model, family, text, len(text)).sites[site]
    if read == "mean":
        return hidden.mean(1).double()
    return hidden[:, -1 if read == "last" else read].double()


def directions_by_hand(family, positive, negative, read, site, pairs=None):
    pairs = range(len(positive)) if pairs is None else pairs
    differences = [
        states_by_hand(family, positive[i], read, site) - states_by_hand(family, negative[i], read, site) for i in pairs
    ]
    return torch.stack(differences).mean(0)


def assert_close(ours, expected):
    assert ours.shape == expected.shape
    assert np.abs(ours - expected.numpy()).max() <= 1e-5 * max(10.0, expected.abs().max().item())


@pytest.mark.parametrize("family", STEERED_FAMILIES)
@pytest.mark.parametrize(
    ("read", "site"), [("last", "resid_post"), ("mean", "resid_post"), (1, "resid_pre"), (-3, "resid_post")]
)
def test_directions_equal_a_mean_by_hand_over_separate_unpadded_passes(family, read, site):
    positive, negative = pairs_of()
    event = extracted(engine_of(family), positive, negative, read=read, site=site, batch_size=3)  # 3 + 3 + 1
    assert event.directions.dtype == np.float32
    assert event.directions.shape == (N_BLOCKS, D_MODEL)
    assert_close(event.directions, directions_by_hand(family, positive, negative, read, site))
    assert not event.cancelled


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("batch_size", [1, 2, 7, 16])
def test_the_batch_size_does_not_matter(batch_size, site):
    positive, negative = pairs_of()
    event = extracted(engine_of("llama"), positive, negative, batch_size=batch_size, site=site)
    assert_close(event.directions, directions_by_hand("llama", positive, negative, "last", site))


@pytest.mark.parametrize("read", ["last", "mean", 0])
def test_texts_longer_than_one_step_are_read_right(read):
    """64 tokens a step at 16 rows: these take two, and the read position lies in either."""
    positive, negative = pairs_of([(100, 40), (90, 70), (20, 100)] * 3)
    event = extracted(engine_of("llama"), positive, negative, read=read, batch_size=8)
    assert_close(event.directions, directions_by_hand("llama", positive, negative, read, "resid_post"))


def separation_by_hand(family, positive, negative, site="resid_post"):
    """d′ of every fourth pair along the direction of the other pairs; of all along their own below eight pairs."""
    n = len(positive)
    held = list(range(n)) if n < 8 else list(range(3, n, 4))
    rest = list(range(n)) if n < 8 else [i for i in range(n) if i not in held]
    axes = directions_by_hand(family, positive, negative, "last", site, rest)
    sides = [
        torch.stack([(states_by_hand(family, texts[i], "last", site) * axes).sum(1) for i in held], 1)
        for texts in (positive, negative)
    ]
    spread = ((sides[0].var(1) + sides[1].var(1)) / 2).sqrt()
    return ((sides[0].mean(1) - sides[1].mean(1)) / spread).numpy()


@pytest.mark.parametrize("n_pairs", [2, 7, 8, 9, 21])
def test_separation_is_that_of_pairs_that_the_direction_has_not_seen(n_pairs):
    positive, negative = pairs_of([LENGTHS[i % 7] for i in range(n_pairs)])
    event = extracted(engine_of("llama"), positive, negative, batch_size=5)
    np.testing.assert_allclose(event.separation, separation_by_hand("llama", positive, negative), rtol=1e-4, atol=1e-4)
    # the direction itself is of all pairs
    assert_close(event.directions, directions_by_hand("llama", positive, negative, "last", "resid_post"))


def test_every_text_goes_through_the_model_once():
    engine = engine_of("llama")
    seen = []

    def count(module, args, kwargs):
        seen.append(kwargs["attention_mask"][:, -kwargs["input_ids"].shape[1] :].sum().item())

    handle = engine.model.model.register_forward_pre_hook(count, with_kwargs=True)
    positive, negative = pairs_of()
    extracted(engine, positive, negative, batch_size=3)
    handle.remove()
    assert len(seen) == 3
    assert sum(seen) == sum(a + b for a, b in LENGTHS)


def test_extraction_leaves_no_hook_behind():
    model = engine_of("llama").model
    before = hook_count(model)
    extracted(engine_of("llama"), *pairs_of())
    assert hook_count(model) == before
    with pytest.raises(UserError):
        extracted(engine_of("llama"), *pairs_of(), read=40)
    assert hook_count(model) == before


def test_a_cancelled_extraction_says_so_and_stops_the_model():
    engine, control, steps = engine_of("llama"), Control(), []

    def stop(*_):
        steps.append(1)
        control.cancel()

    handle = engine.model.model.register_forward_pre_hook(stop)
    event = extracted(engine, *pairs_of(), control, batch_size=1)
    handle.remove()
    assert event.cancelled
    assert len(steps) == 1


def test_the_data_hash_is_that_of_the_pairs():
    positive, negative = pairs_of()
    hashes = {
        extracted(engine_of("llama"), *sides).data_hash
        for sides in ((positive, negative), (positive, negative), (negative, positive), (positive[:-1], negative[:-1]))
    }
    assert len(hashes) == 3
    assert all(len(h) == 64 for h in hashes)


class TestReadWeights:
    BATCH = Batch.of([[5, 6], [7, 8, 9, 10]], PAD, torch.device("cpu"))

    @pytest.mark.parametrize(
        ("read", "weights"),
        [
            ("last", [[0, 0, 0, 1], [0, 0, 0, 1]]),
            ("mean", [[0, 0, 0.5, 0.5], [0.25] * 4]),
            (0, [[0, 0, 1, 0], [1, 0, 0, 0]]),
            (1, [[0, 0, 0, 1], [0, 1, 0, 0]]),
            (-1, [[0, 0, 0, 1], [0, 0, 0, 1]]),
            (-2, [[0, 0, 1, 0], [0, 0, 1, 0]]),
        ],
    )
    def test_positions_count_from_a_rows_own_first_token(self, read, weights):
        assert read_weights(self.BATCH, read).tolist() == weights

    @pytest.mark.parametrize("read", [2, -3])
    def test_an_index_outside_a_text_is_refused(self, read):
        with pytest.raises(UserError, match=f"read position {read} is outside a text of 2 tokens"):
            read_weights(self.BATCH, read)

    @pytest.mark.parametrize("read", ["first", "", 1.5, None])
    def test_an_unknown_position_is_refused(self, read):
        with pytest.raises(UserError, match=f"read position {read!r} is unknown; one of last, mean or an index"):
            read_weights(self.BATCH, read)


def planted_model():
    """A llama whose blocks add nothing, where token 20's embedding is token 10's plus a known direction."""
    model = tiny_model("llama")
    planted = torch.linspace(-2, 3, D_MODEL)
    with torch.no_grad():
        for block in blocks_of(model, "llama"):
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        embedding = model.get_input_embeddings().weight
        embedding[20] = embedding[10] + planted
    return model, planted


@pytest.mark.parametrize("site", SITES)
def test_a_planted_direction_is_recovered_at_every_block(site):
    model, planted = planted_model()
    contexts = [tuple(prompt_ids(n, seed=n)) for n in (2, 5, 9)]
    positive, negative = ([(*context, token) for context in contexts] for token in (20, 10))
    event = extracted(Engine(model, PAD), tuple(positive), tuple(negative), site=site)
    np.testing.assert_allclose(event.directions, np.tile(planted.numpy(), (N_BLOCKS, 1)), atol=1e-5)


def test_a_planted_direction_is_diluted_by_the_length_when_the_mean_is_read():
    model, planted = planted_model()
    positive, negative = ((tuple([*prompt_ids(3, seed=1), token]),) for token in (20, 10))
    event = extracted(Engine(model, PAD), positive, negative, read="mean")
    np.testing.assert_allclose(event.directions[1], planted.numpy() / 4, atol=1e-5)


WORDS = ("the cat sat", "a dog ran to the house", "the man had tea", "one day", "the red mat and the cat", "her house")
ENDS = (("cat", "dog", "man"), ("tea", "house", "day"))
TEXTS = [tuple(f"{text} {side[i % 3]}" for side in ENDS) for i, text in enumerate((*WORDS, *WORDS[::-1]))]


@pytest.fixture
def session():
    session = nblens.attach(engine_of("llama").model, tiny_tokenizer())
    yield session
    session.unload()


def ids_of(texts):
    return tuple(tuple(tiny_tokenizer()(text)["input_ids"]) for text in texts)


def test_a_session_extracts_from_texts_and_keeps_the_vector(session):
    vector = session.extract("kept", TEXTS)
    positive, negative = (ids_of(side) for side in zip(*TEXTS, strict=True))
    expected = directions_by_hand("llama", positive, negative, "last", "resid_post").numpy()
    for block in range(N_BLOCKS):
        assert np.abs(vector.directions[block] - expected[block]).max() <= 1e-3
    assert session.vectors["kept"] is vector or repr(session.vectors["kept"]) == repr(vector)
    assert (vector.name, vector.site, vector.method, vector.read) == ("kept", "resid_post", "mean_diff", "last")
    assert (vector.n_pairs, vector.n_blocks, vector.d_model) == (12, N_BLOCKS, D_MODEL)


@pytest.mark.parametrize("site", SITES)
def test_the_vector_keeps_how_far_apart_each_block_holds_held_back_pairs(session, site):
    vector = session.extract("best", TEXTS, site=site)
    positive, negative = (ids_of(side) for side in zip(*TEXTS, strict=True))
    expected = separation_by_hand("llama", positive, negative, site)
    np.testing.assert_allclose([vector.separation[b] for b in range(N_BLOCKS)], expected, rtol=1e-3, atol=1e-3)
    assert vector.site == site
    assert vector.layers == (best_block(expected, len(TEXTS)),)


@pytest.mark.parametrize("best", range(4, 8))
def test_it_is_written_by_default_where_the_middle_third_separates_best(best):
    separation = np.full(12, 1.0)
    separation[[0, 3, 8, 11]] = 9.0  # the ends separate better still
    separation[best] = 2.0
    assert best_block(separation, 8) == best


def test_too_few_pairs_to_hold_any_back_are_written_at_the_middle_block():
    assert best_block(np.arange(12.0), 7) == 6


@pytest.mark.parametrize("planted", [2, 3])
def test_it_is_written_at_the_block_where_the_sides_were_planted(planted):
    """Of six blocks one holds positive and negative endings apart, and the next forgets it."""
    model, ids = tiny_model("gpt2", n_layer=6), []
    positive = {tiny_tokenizer()(f" {word}", add_special_tokens=False)["input_ids"][-1] for word in ENDS[0]}

    def separate(module, args, output):
        side = torch.tensor([1.0 if row[-1].item() in positive else -1.0 for row in ids[-1]])
        return output + 50 * side[:, None, None]

    def forget(module, args, output):
        return torch.randn(output.shape, generator=torch.Generator().manual_seed(0))

    session = nblens.attach(model, tiny_tokenizer())  # before the hooks: a model that forgets would be refused
    model.register_forward_pre_hook(lambda m, args, kwargs: ids.append(kwargs["input_ids"]), with_kwargs=True)
    blocks_of(model, "gpt2")[planted].register_forward_hook(separate)
    blocks_of(model, "gpt2")[planted + 1].register_forward_hook(forget)
    vector = session.extract("v", TEXTS)
    session.unload()
    assert vector.layers == (planted,)
    assert max(vector.separation, key=vector.separation.get) == planted


@pytest.mark.parametrize("n_blocks", range(1, 40))
def test_a_model_of_any_depth_has_a_block_to_write_at(n_blocks):
    for separation in (np.arange(n_blocks), -np.arange(n_blocks)):
        assert 0 <= best_block(separation, 8) < n_blocks
        assert 0 <= best_block(separation, 1) < n_blocks


def test_asked_for_blocks_are_written_instead_of_the_best(session):
    assert session.extract("asked", TEXTS, layers="0,-1").layers == (0, N_BLOCKS - 1)
    assert session.extract("asked", TEXTS, layers=1).layers == (1,)


def test_extracting_again_replaces_the_vector(session):
    session.extract("again", TEXTS)
    session.extract("again", TEXTS[:3])
    assert session.vectors["again"].n_pairs == 3


def test_pairs_may_come_from_a_generator_and_as_lists(session):
    vector = session.extract("lists", ([a, b] for a, b in TEXTS))
    assert vector.n_pairs == len(TEXTS)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "there are no contrast pairs"),
        ([("the cat", "the dog"), "the cat"], "pair 2 must be .*'the cat'"),
        (["ab"], "pair 1 must be .*'ab'"),
        ([("the cat",)], r"pair 1 must be .*\('the cat',\)"),
        ([("a", "b", "c")], "pair 1 must be"),
        ([("the cat", "")], "pair 1.*empty"),
        ([(1, 2)], "pair 1"),
        ([None], "pair 1"),
        ("the cat", "pair 1 must be"),
    ],
    ids=str,
)
def test_malformed_pairs_are_refused_by_number_and_nothing_is_kept(session, pairs, message):
    with pytest.raises(UserError, match=message) as caught:
        session.extract("broken", pairs)
    assert "\n" not in str(caught.value)
    assert "broken" not in session.vectors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "pca"}, "'pca' is unknown; one of mean_diff"),
        ({"site": "mlp_in"}, "'mlp_in' is unknown; one of resid_pre, ln1_out"),
        ({"read": "first"}, "'first' is unknown; one of last, mean or an index"),
        ({"read": 99}, "position 99 is outside a text of"),
        ({"layers": 3}, "layer 3 is out of range; the model has blocks 0-2"),
    ],
    ids=str,
)
def test_unknown_options_are_refused_by_name_and_nothing_is_kept(session, options, message):
    with pytest.raises(UserError, match=message):
        session.extract("broken", TEXTS, **options)
    assert "broken" not in session.vectors
    assert session.extract("sound", TEXTS[:2]).n_pairs == 2


@pytest.mark.parametrize("name", ["", "two words", "a=1", "x/y", None, 3])
def test_a_name_that_a_magic_could_not_spell_is_refused(session, name):
    with pytest.raises(UserError, match=f"letters, digits.*got {name!r}"):
        session.extract(name, TEXTS)


def test_the_table_of_methods_says_what_each_is():
    assert METHODS.keys() == {"mean_diff"}
