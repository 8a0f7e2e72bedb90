"""mean_diff equals a mean by hand over separate unpadded passes, and finds a direction planted in a model."""

import json

import numpy as np
import pytest
import scipy.stats
import torch
from steered_runs import PAD, SITES, STEERED_FAMILIES, blocks_of, engine_of, hook_count, plain_pass
from tiny_models import D_MODEL, N_BLOCKS, prompt_ids, tiny_model, tiny_tokenizer

import nblens
from nblens import UserError
from nblens.engine import extracting
from nblens.engine.control import Control
from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.files import read_safetensors, write_safetensors
from nblens.model.generation import Batch
from nblens.specs import EXTRACTION_METHODS, ExtractionFinished, ExtractionSpec, Progress
from nblens.steering.estimators import ESTIMATORS, METHODS
from nblens.steering.extraction import SpanReader, shuffle_signs
from nblens.steering.judging import Judges, best_block, separation
from nblens.steering.read_positions import READ_POSITIONS, check_read, read_name, read_span

LENGTHS = ((4, 7), (9, 3), (5, 5), (12, 4), (3, 8), (6, 6), (8, 11))  # tokens of the two texts of each pair


def pairs_of(lengths=LENGTHS):
    """(positive texts, negative texts) as token ids."""
    return tuple(
        tuple(tuple(prompt_ids(pair[side], seed=2 * i + side)) for i, pair in enumerate(lengths)) for side in (0, 1)
    )


def extracted(engine, positive, negative, control=None, read="last", **spec):
    events = []
    spans = (tuple(read_span(read, len(text)) for text in texts) for texts in (positive, negative))
    engine.run(ExtractionSpec(positive, negative, *spans, **spec), events.append, control or Control())
    *progress, event = events
    assert all(isinstance(before, Progress) for before in progress)
    assert isinstance(event, ExtractionFinished)
    return event


def states_by_hand(family, text, read, site, model=None):
    """(n_blocks, d_model) from one unpadded forward pass over one text."""
    model = model or engine_of(family).runner.model
    hidden = plain_pass(model, family, text, len(text)).sites[site]
    if read == "mean":
        return hidden.mean(1).double()
    if isinstance(read, slice):
        return hidden[:, read].double().mean(1)
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
    ("read", "site"),
    [
        ("last", "resid_post"),
        ("mean", "resid_post"),
        (1, "resid_pre"),
        (-3, "resid_post"),
        (slice(1, 3), "resid_post"),
        (slice(-3, None), "resid_pre"),
    ],
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


@pytest.mark.parametrize("read", ["last", "mean", 0, -13, slice(10, 14)])
def test_texts_longer_than_one_step_are_read_right(read, monkeypatch):
    """8 tokens a step at 2 rows: these take many, and what is read lies in any, in several or in none of them."""
    monkeypatch.setattr(extracting, "CPU_TOKENS", 16)
    positive, negative = pairs_of([(100, 40), (90, 70), (20, 100)])
    event = extracted(engine_of("llama"), positive, negative, read=read)
    assert_close(event.directions, directions_by_hand("llama", positive, negative, read, "resid_post"))


@pytest.mark.parametrize("read", ["last", "mean", 0])
def test_what_stands_at_padding_need_not_be_a_number(read):
    batch = Batch.of([[5, 6], [7, 8, 9, 10]], PAD, torch.device("cpu"))
    hidden = torch.randn(2, 4, D_MODEL)
    hidden[0, :2] = torch.nan
    reader = SpanReader(1, batch, [read_span(read, 2), read_span(read, 4)])
    reader.begin(range(4))
    reader.writer(0)(hidden)
    rows = [states[slice(*read_span(read, len(states)))].mean(0) for states in (hidden[0, 2:], hidden[1])]
    torch.testing.assert_close(reader.states(), torch.stack(rows)[None])


def fed_widths(engine, work):
    """(rows, columns) of every forward pass."""
    seen = []
    handle = engine.runner.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    work()
    handle.remove()
    return seen


def test_no_step_is_fed_after_the_last_column_that_is_read(monkeypatch):
    monkeypatch.setattr(extracting, "CPU_TOKENS", 16)
    sides = pairs_of([(100, 100)])
    assert fed_widths(engine_of("llama"), lambda: extracted(engine_of("llama"), *sides, read=9)) == [(2, 8)] * 2


def test_pairs_of_similar_length_share_a_batch_of_one_step():
    lengths = [(5, 6), (60, 70), (4, 4), (100, 20), (6, 3), (90, 95)]
    widths = fed_widths(engine_of("llama"), lambda: extracted(engine_of("llama"), *pairs_of(lengths * 4)))
    assert widths == [(24, 6), (10, 95), (10, 100), (4, 100)]
    assert all(rows * width <= extracting.CPU_TOKENS for rows, width in widths)
    assert sum(rows for rows, _ in widths) == 2 * len(lengths * 4)


def separation_by_hand(family, positive, negative, site="resid_post"):
    """Each pair's difference along the unit direction of all the others; its mean in standard deviations."""
    n = len(positive)
    sides = [
        torch.stack([states_by_hand(family, ids, "last", site) for ids in texts]) for texts in (positive, negative)
    ]
    differences, along = (sides[0] - sides[1]).double(), []
    for i in range(n):
        others = [k for k in range(n) if k != i]
        axis = differences[others].mean(0)
        along.append((differences[i] * axis).sum(1) / axis.norm(dim=1))
    return (torch.stack(along).mean(0) / torch.stack(along).std(0)).numpy()


@pytest.mark.parametrize("n_pairs", [4, 7, 8, 9, 21])
def test_separation_is_that_of_pairs_that_the_direction_has_not_seen(n_pairs):
    positive, negative = pairs_of([LENGTHS[i % 7] for i in range(n_pairs)])
    event = extracted(engine_of("llama"), positive, negative, batch_size=5)
    expected = separation_by_hand("llama", positive, negative)
    np.testing.assert_allclose(event.separation, expected, rtol=1e-3, atol=1e-4)
    error = np.sqrt(1 / n_pairs + expected**2 / (2 * (n_pairs - 1)))
    np.testing.assert_allclose(event.separation_error, error, rtol=1e-3, atol=1e-4)
    # the direction itself is of all pairs
    assert_close(event.directions, directions_by_hand("llama", positive, negative, "last", "resid_post"))


def test_every_text_goes_through_the_model_once():
    engine = engine_of("llama")
    seen = []

    def count(module, args, kwargs):
        seen.append(kwargs["attention_mask"][:, -kwargs["input_ids"].shape[1] :].sum().item())

    handle = engine.runner.model.model.register_forward_pre_hook(count, with_kwargs=True)
    positive, negative = pairs_of()
    extracted(engine, positive, negative, batch_size=3)
    handle.remove()
    assert len(seen) == 3
    assert sum(seen) == sum(a + b for a, b in LENGTHS)


def test_extraction_leaves_no_hook_behind():
    model = engine_of("llama").runner.model
    before = hook_count(model)
    extracted(engine_of("llama"), *pairs_of())
    assert hook_count(model) == before
    with pytest.raises(UserError):
        extracted(engine_of("llama"), *(sides[:1] for sides in pairs_of()), method="pca_diff")
    assert hook_count(model) == before


def test_a_cancelled_extraction_says_so_and_stops_the_model():
    engine, control, steps = engine_of("llama"), Control(), []

    def stop(*_):
        steps.append(1)
        control.cancel()

    handle = engine.runner.model.model.register_forward_pre_hook(stop)
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


@pytest.mark.parametrize(
    ("read", "span", "name"),
    [
        ("last", (9, 10), "last"),
        ("mean", (0, 10), "mean"),
        ("label", (6, 7), "label"),
        (0, (0, 1), "0"),
        (np.int64(3), (3, 4), "3"),
        (-1, (9, 10), "-1"),
        (-10, (0, 1), "-10"),
        ("3-7", (3, 8), "3-7"),
        (" 3 - 3 ", (3, 4), " 3 - 3 "),
        ("-3--1", (7, 10), "-3--1"),
        ("2--2", (2, 9), "2--2"),
        ((3, 8), (3, 8), "3-7"),
        ([3, 8], (3, 8), "3-7"),
        ((-4, -1), (6, 9), "-4--2"),
        (slice(3, 8), (3, 8), "3-7"),
        (slice(None, 4), (0, 4), "0-3"),
        (slice(-3, None), (7, 10), "-3--1"),
        (slice(None), (0, 10), "0--1"),
        (slice(0, 10, 1), (0, 10), "0-9"),
    ],
    ids=str,
)
def test_a_read_position_is_a_span_of_a_text_and_has_a_name(read, span, name):
    assert read_span(read, 10, label=6) == span
    assert read_name(read) == name
    check_read(read)
    assert name in READ_POSITIONS or name.strip("-").isdigit() or read_span(name, 10) == span


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (2, "read position 2 is outside a text of 2 tokens"),
        (-3, "read position -3 is outside a text of 2 tokens"),
        ("1-2", "read span 1-2 is outside a text of 2 tokens"),
        (slice(-3, None), "read span -3--1 is outside a text of 2 tokens"),
        ((1, 1), "read span 1-0 holds no token of a text of 2 tokens"),
        (slice(2, None), "read span 2--1 holds no token of a text of 2 tokens"),
        ("label", "this text has no label to read"),
    ],
    ids=str,
)
def test_a_place_outside_a_text_is_refused(read, message):
    check_read(read)
    with pytest.raises(UserError, match=message):
        read_span(read, 2)


@pytest.mark.parametrize(
    "read",
    ["first", "", "3-", "a-b", 1.5, None, True, (1,), (1, 2, 3), (1, "a"), slice(0, 4, 2), slice(0.5, 2)],
    ids=str,
)
def test_an_unknown_position_is_refused(read):
    for check in (lambda: check_read(read), lambda: read_span(read, 5)):
        with pytest.raises(UserError) as caught:
            check()
        known = "one of last, label, mean, an index, a span such as 3-7, or in a conversation system, user, assistant, "
        known += "tool, developer or turn:N"
        assert str(caught.value) == f"read position {read!r} is unknown; {known}"


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
    event = extracted(Engine(Runner.of(model, PAD)), tuple(positive), tuple(negative), site=site)
    np.testing.assert_allclose(event.directions, np.tile(planted.numpy(), (N_BLOCKS, 1)), atol=1e-5)


def test_a_planted_direction_is_diluted_by_the_length_when_the_mean_is_read():
    model, planted = planted_model()
    positive, negative = ((tuple([*prompt_ids(3, seed=1), token]),) for token in (20, 10))
    event = extracted(Engine(Runner.of(model, PAD)), positive, negative, read="mean")
    np.testing.assert_allclose(event.directions[1], planted.numpy() / 4, atol=1e-5)


WORDS = ("the cat sat", "a dog ran to the house", "the man had tea", "one day", "the red mat and the cat", "her house")
ENDS = (("cat", "dog", "man"), ("tea", "house", "day"))
TEXTS = [tuple(f"{text} {side[i % 3]}" for side in ENDS) for i, text in enumerate((*WORDS, *WORDS[::-1]))]


@pytest.fixture
def session():
    session = nblens.attach(engine_of("llama").runner.model, tiny_tokenizer())
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
    error = np.sqrt(1 / 12 + expected**2 / 22)
    assert vector.layers == (best_block(expected, error),)
    for block in range(N_BLOCKS):
        reach = scipy.stats.t.ppf(0.975, 11) * error[block]
        assert vector.separation_interval[block] == pytest.approx(
            (expected[block] - reach, expected[block] + reach), rel=1e-3
        )
    assert f"separation {vector.separation_words(vector.layers[0])}, mean_diff of 12 pairs" in repr(vector)


@pytest.mark.parametrize("best", range(4, 10))
def test_it_is_written_by_default_where_the_middle_of_the_depth_separates_best(best):
    separation = np.full(12, 1.0)
    separation[[0, 3, 10, 11]] = 9.0  # the ends separate better still
    separation[best] = 2.0
    assert best_block(separation, np.full(12, 0.5)) == best


def test_of_blocks_that_are_as_good_as_the_best_it_is_the_last():
    separation = np.array([0, 0, 0, 0, 1.0, 2.0, 1.8, 1.7, 1.2, 1.0, 3, 3])
    assert best_block(separation, np.full(12, 0.35)) == 7
    assert best_block(separation, np.full(12, 0.1)) == 5


def test_too_few_pairs_to_judge_by_are_written_at_the_middle_block(session):
    assert best_block(np.full(12, np.nan), np.full(12, np.nan)) == 6
    vector = session.extract("few", TEXTS[:3])
    assert (vector.layers, vector.separation, vector.separation_interval) == ((1,), {}, {})
    assert "separation" not in repr(vector)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_pairs", [5, 20, 70])
def test_every_method_is_judged_by_directions_that_have_not_seen_the_pair(method, n_pairs):
    """Of sides that do not differ but for noise, directions that had seen it would tell them apart."""
    draw = torch.Generator().manual_seed(n_pairs)
    positive, negative = (torch.randn(2, n_pairs, 400, generator=draw) for _ in range(2))
    judges, estimator = Judges.of(method, n_pairs), ESTIMATORS[method](2, 400)
    held = list(judges.pairs)
    rest = list(range(n_pairs)) if judges.one_by_one else [i for i in range(n_pairs) if i not in held]
    estimator.add(positive[:, rest], negative[:, rest])
    along = judges.projections(positive[:, held], negative[:, held], estimator.directions())
    assert len(held) == (min(n_pairs, 64) if method == "mean_diff" and n_pairs < 65 else len(held)) > 3
    distance, error = separation(along)
    assert (np.abs(distance) < 4 * error).all()
    for place in {0, len(held) - 1}:
        others = [i for i in (range(n_pairs) if judges.one_by_one else rest) if i != held[place]]
        alone = ESTIMATORS[method](2, 400)
        alone.add(positive[:, others], negative[:, others])
        axis = torch.from_numpy(alone.directions()).double()
        difference = (positive - negative)[:, held[place]].double()
        expected = (difference * axis).sum(1) / axis.norm(dim=1)
        torch.testing.assert_close(along[:, place], expected, rtol=1e-3, atol=1e-3)


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
    for distances in (np.arange(n_blocks), -np.arange(n_blocks), np.full(n_blocks, np.nan)):
        assert 0 <= best_block(distances, np.ones(n_blocks)) < n_blocks


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
        ([(["the", "cat"], "a")], r"pair 1: a side must be text, token ids or messages, got \['the', 'cat'\]"),
        ([([5, 6], [])], "pair 1: the prompt is empty"),
        ([([5, 6], [5, 999])], "pair 1: token id 999 is outside the vocabulary"),
        ("the cat", r"pairs are read from .jsonl, .json, .csv files; got 'the cat'"),
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
        ({"method": "pca"}, "'pca' is unknown; one of mean_diff, pca_diff, pca_center, logistic"),
        ({"site": "mlp_in"}, "'mlp_in' is unknown; one of resid_pre, ln1_out"),
        ({"read": "first"}, "'first' is unknown; one of last, label, mean, an index, a span"),
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
    assert tuple(METHODS) == tuple(ESTIMATORS) == EXTRACTION_METHODS


@pytest.mark.parametrize("method", EXTRACTION_METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_every_method_works_on_the_activations_that_plain_passes_read(family, method):
    positive, negative = pairs_of(LENGTHS * 2)
    event = extracted(engine_of(family), positive, negative, read="mean", method=method, batch_size=4)
    sides = [
        torch.stack([states_by_hand(family, text, "mean", "resid_post") for text in t], 1) for t in (positive, negative)
    ]
    estimator = ESTIMATORS[method](N_BLOCKS, D_MODEL)
    estimator.add(*(side.float() for side in sides))
    expected = estimator.directions()
    assert np.abs(event.directions - expected).max() <= 1e-3 * np.abs(expected).max()
    texts = [
        plain_pass(engine_of(family).runner.model, family, text, len(text)) for t in (positive, negative) for text in t
    ]
    norms = torch.stack([text.sites["resid_post"].norm(dim=-1).mean(1) for text in texts]).mean(0).numpy()
    np.testing.assert_allclose(event.activation_norms, norms, rtol=1e-5)
    assert event.activation_norms.dtype == np.float32


@pytest.mark.parametrize("method", EXTRACTION_METHODS)
def test_shuffled_directions_are_those_of_swapped_pairs_and_repeat_by_seed(method):
    positive, negative = pairs_of(LENGTHS * 2)
    event = extracted(engine_of("llama"), positive, negative, method=method, n_shuffles=3, seed=5)
    plain = extracted(engine_of("llama"), positive, negative, method=method)
    np.testing.assert_allclose(event.directions, plain.directions, rtol=1e-6)
    assert plain.shuffled.shape == (0, N_BLOCKS, D_MODEL)
    assert event.shuffled.shape == (3, N_BLOCKS, D_MODEL)
    again = extracted(engine_of("llama"), positive, negative, method=method, n_shuffles=3, seed=5)
    np.testing.assert_array_equal(again.shuffled, event.shuffled)
    other = extracted(engine_of("llama"), positive, negative, method=method, n_shuffles=3, seed=6)
    assert not np.array_equal(other.shuffled, event.shuffled)
    for signs, ours in zip(shuffle_signs(14, 3, 5), event.shuffled, strict=True):
        assert 0 < (signs < 0).sum() < 14
        pairs = [(n, p) if sign < 0 else (p, n) for p, n, sign in zip(positive, negative, signs, strict=True)]
        swapped = extracted(engine_of("llama"), *zip(*pairs, strict=True), method=method)
        assert np.abs(ours - swapped.directions).max() <= 1e-3 * np.abs(swapped.directions).max()


def test_only_the_blocks_asked_for_are_read():
    sides = pairs_of()
    whole = extracted(engine_of("llama"), *sides)
    some = extracted(engine_of("llama"), *sides, blocks=(2, 0))
    np.testing.assert_array_equal(some.directions, whole.directions[[2, 0]])
    np.testing.assert_array_equal(some.activation_norms, whole.activation_norms[[2, 0]])


def test_pairs_that_do_not_differ_where_they_are_read_are_refused(session):
    with pytest.raises(UserError, match="the same activations where they are read"):
        session.extract("same", [("the cat", "the dog")], read=0)
    assert "same" not in session.vectors


def place_where_they_part(one, other):
    return [a == b for a, b in zip(one, other, strict=False)].index(False)


def test_a_label_is_read_where_the_answers_part(session):
    answers = [(f" {one} one", f" {other} day") for one, other in zip(*ENDS, strict=True)]
    samples = [nblens.Sample(f"{text} the", *answers[i % 3]) for i, text in enumerate(WORDS)]
    by_label = session.extract("label", samples, read="label")
    positive, negative = (ids_of([s.prompt + getattr(s, side) for s in samples]) for side in ("positive", "negative"))
    differences = []
    for one, other in zip(positive, negative, strict=True):
        place = place_where_they_part(one, other)
        differences.append(
            states_by_hand("llama", one, place, "resid_post") - states_by_hand("llama", other, place, "resid_post")
        )
    expected = torch.stack(differences).mean(0)
    for block in range(N_BLOCKS):
        assert np.abs(by_label.directions[block] - expected[block].numpy()).max() <= 1e-3
    texts = session.extract("texts", [(s.prompt + s.positive, s.prompt + s.negative) for s in samples], read="label")
    np.testing.assert_array_equal(texts.directions[1], by_label.directions[1])
    ids = session.extract("ids", list(zip(positive, negative, strict=True)), read="label")
    np.testing.assert_array_equal(ids.directions[1], by_label.directions[1])
    assert by_label.read == "label"
    assert not np.array_equal(session.extract("last", samples).directions[1], by_label.directions[1])


def test_a_samples_prompt_goes_through_the_chat_template_and_its_answer_follows(session):
    template = (
        "{% for m in messages %}the {{ m['content'] }} one{% endfor %}{% if add_generation_prompt %} day{% endif %}"
    )
    session.tokenizer.chat_template = template
    try:
        for read in ("last", "label"):
            vector = session.extract("chat", [nblens.Sample("cat", " man", " dog")], read=read, chat=True)
            ids = [
                tuple(tiny_tokenizer()(f"the cat one day {a}", add_special_tokens=False)["input_ids"])
                for a in ("man", "dog")
            ]
            index = "last" if read == "last" else [x == y for x, y in zip(*ids, strict=False)].index(False)
            expected = directions_by_hand("llama", ids[:1], ids[1:], index, "resid_post").numpy()
            assert np.abs(vector.directions[1] - expected[1]).max() <= 1e-3
        with pytest.raises(UserError, match="pair 1: under chat, a label is read in an answer; give Sample"):
            session.extract("chat", [("cat", "dog")], read="label", chat=True)
    finally:
        session.tokenizer.chat_template = None


def test_a_span_is_kept_by_name_and_norms_are_saved(session, tmp_path):
    vector = session.extract("span", TEXTS, read=slice(-2, None))
    assert vector.read == "-2--1"
    np.testing.assert_array_equal(session.extract("again", TEXTS, read="-2--1").directions[1], vector.directions[1])
    assert sorted(vector.activation_norms) == list(range(N_BLOCKS))
    assert min(vector.activation_norms.values()) > 0
    loaded = nblens.SteeringVector.load(vector.save(tmp_path / "v.safetensors"))
    assert loaded.activation_norms == vector.activation_norms


def test_a_vector_of_a_file_from_before_norms_still_loads(session, tmp_path):
    arrays, metadata = read_safetensors(session.extract("old", TEXTS).save(tmp_path / "v.safetensors"))
    plain = json.loads(metadata["fields"])
    del plain["activation_norms"]
    write_safetensors(tmp_path / "v.safetensors", arrays, {**metadata, "fields": json.dumps(plain)})
    assert nblens.SteeringVector.load(tmp_path / "v.safetensors").activation_norms == {}


def test_pairs_may_come_from_a_file(session, tmp_path):
    rows = [json.dumps({"positive": a, "negative": b}) for a, b in TEXTS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    vector = session.extract("file", tmp_path / "pairs.jsonl")
    assert vector.data_hash == session.extract("list", TEXTS).data_hash


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_a_bar_over_the_batches(session, monkeypatch, shown):
    bars = []

    class Bar:
        def __init__(self, **options):
            bars.append(options)
            self.updates = 0

        def update(self):
            self.updates += 1

        def close(self):
            bars.append(self.updates)

    monkeypatch.setattr("nblens.progress.tqdm", Bar)
    monkeypatch.setattr(extracting, "CPU_TOKENS", 32)
    session.extract("v", TEXTS, progress=shown)
    options, updates = bars
    assert options["total"] == updates > 1
    assert (options.get("disable", False), options["delay"]) == (not shown, 2)
