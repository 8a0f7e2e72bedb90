"""What a mean over tokens takes in: not the tokens where attention rests, whose activations would be all of it."""

import re
import warnings

import numpy as np
import pytest
import torch
from every_tokenizer import byte_fallback, byte_level
from reports import made_up_report
from steered_runs import endless_model, plain_pass
from tiny_models import D_MODEL, N_BLOCKS

import nblens
from nblens import UserError
from nblens.model.generation import Batch
from nblens.steering.extraction import SpanReader
from nblens.steering.read_positions import mean_positions, read_name, read_span, read_words

TOKENIZER = byte_level("bos")
PAIRS = [("the cat sat", "the dog sat on"), ("Paris is a mat", "Rome is the cat"), ("yes cat", "no dog")]
SINK = TOKENIZER.bos_token_id


@pytest.fixture
def session(attach):
    """A model in which a text's beginning is a thousand times as long as any other token."""
    model = endless_model("llama", vocab_size=len(TOKENIZER))
    with torch.no_grad():
        model.get_input_embeddings().weight[SINK] *= 1000
    return attach(model, TOKENIZER)


def states_of(session, text, ids=None):
    """Tokens and the stream after each block, (n_blocks, n_tokens, d_model), by plain hooks."""
    ids = tuple(TOKENIZER(text)["input_ids"]) if ids is None else ids
    return ids, plain_pass(session.model, "llama", ids, len(ids)).sites["resid_post"].double()


def direction_of(session, positions, pairs=PAIRS):
    """Mean difference of the means over some positions of each text."""
    means = []
    for sign, texts in zip((1, -1), zip(*pairs, strict=True), strict=True):
        for text in texts:
            ids, states = states_of(session, text)
            means.append(sign * states[:, positions(ids)].mean(1))
    return torch.stack(means).sum(0) / len(pairs)


def without_first(ids):
    return range(1, len(ids))


def assert_near(vector, expected):
    ours = np.stack([vector.directions[block] for block in range(N_BLOCKS)])
    assert np.abs(ours - expected.numpy()).max() <= 1e-4 * expected.abs().max().item()


@pytest.mark.filterwarnings("ignore:read at")
def test_a_mean_leaves_out_special_and_first_tokens_and_takes_them_in_by_name(session):
    vector = session.extract("v", PAIRS, read="mean", progress=False)
    assert_near(vector, direction_of(session, without_first))
    assert vector.read == "mean"
    assert "read at mean without special and first tokens" in repr(vector)
    vector = session.extract("v", PAIRS, read="mean+special", progress=False)
    assert_near(vector, direction_of(session, lambda ids: range(len(ids))))
    assert "read at mean with special tokens" in repr(vector)


@pytest.mark.filterwarnings("ignore:read at")
@pytest.mark.parametrize(
    ("read", "kept"),
    [
        ((0, 3), range(1, 3)),
        (slice(0, 3), range(1, 3)),
        ("0-2", range(1, 3)),
        ("0-2+special", range(3)),
        ("1-2", range(1, 3)),
        ("1-1", range(1, 2)),
        (1, range(1, 2)),
    ],
)
def test_so_does_a_span_but_not_one_token_that_is_named(session, read, kept):
    assert_near(session.extract("v", PAIRS, read=read, progress=False), direction_of(session, lambda ids: kept))


def test_special_tokens_in_the_midst_of_a_text_are_left_out(session):
    pairs = [("the</s> cat</s> sat", "the</s> dog</s> sat")]
    vector = session.extract("v", pairs, read="mean", progress=False)
    kept = [1, 3, 5]
    assert TOKENIZER.convert_ids_to_tokens(TOKENIZER(pairs[0][0])["input_ids"]) == [
        *("<s>", "the", "</s>", "Ġcat", "</s>", "Ġsat")
    ]
    assert_near(vector, direction_of(session, lambda ids: kept, pairs))


def test_without_a_beginning_of_its_own_a_text_has_its_first_token_left_out(attach):
    tokenizer = byte_level("none")
    session = attach(endless_model("llama", vocab_size=len(tokenizer)), tokenizer)
    vector = session.extract("v", [("cat sat on", "dog sat on")], read="mean", progress=False)
    sides = []
    for text in ("cat sat on", "dog sat on"):
        _, states = states_of(session, text, tuple(tokenizer(text)["input_ids"]))
        sides.append(states[:, 1:].mean(1))
    assert_near(vector, sides[0] - sides[1])


def test_a_token_that_carries_a_mean_is_told_with_block_and_text(session):
    message = (
        r"read at mean\+special, one token carries more than half of the mean's norm in 6 of 6 texts at block 1, most"
    )
    with pytest.warns(RuntimeWarning, match=f"{message} often '<s>'") as caught:
        session.extract("v", PAIRS, read="mean+special", layers=[1], progress=False)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read in ("mean", "last", 1, "1-1"):
            session.extract("v", PAIRS, read=read, layers=[1], progress=False)


@pytest.mark.parametrize("read", ["last", "label", -1, "mean+special", "mean"])
def test_texts_that_are_read_at_their_first_token_are_told(attach, read):
    tokenizer = byte_level("none")
    session = attach(endless_model("llama", vocab_size=len(tokenizer)), tokenizer)
    pairs = [("cat", "dog"), ("the", "a cat")]
    with pytest.warns(RuntimeWarning, match=f"read at {re.escape(str(read))}, . of 4 texts are read at their first"):
        session.extract("v", pairs, read=read, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.extract("v", [nblens.Sample("the", " cat", " dog")], read="label", progress=False)


def test_norms_and_scale_free_slopes_are_of_the_tokens_that_were_read(session):
    def norms(positions):
        texts = [text for pair in PAIRS for text in pair]
        states = [states_of(session, text) for text in texts]
        return torch.stack([s[:, positions(ids)].norm(dim=-1).mean(1) for ids, s in states]).mean(0).numpy()

    vector = session.extract("v", PAIRS, read="mean", progress=False)
    np.testing.assert_allclose(list(vector.activation_norms.values()), norms(without_first), rtol=1e-4)
    vector = session.extract("v", PAIRS, read="last", progress=False)
    np.testing.assert_allclose(list(vector.activation_norms.values()), norms(lambda ids: [-1]), rtol=1e-4)


def test_a_scale_free_slope_measures_by_the_tokens_that_were_read(session):
    vector = session.vectors["v"] = session.extract("v", PAIRS, read="mean", layers=[1], progress=False)
    samples = [nblens.Sample("the cat sat", " yes", " no"), nblens.Sample("the dog sat", " yes", " no")]
    report = session.steerability(
        "v", samples, (-1, 0, 1), controls=False, neutral=["the cat sat on the mat"], progress=False
    )
    texts = [text for pair in PAIRS for text in pair]
    lengths = [states_of(session, text)[1][1, 1:].norm(dim=-1).mean() for text in texts]
    norm = float(torch.stack(lengths).mean())
    assert report.activation_norm == pytest.approx(norm, rel=1e-4)
    expected = report.fitted.mean_slope * norm / vector.norms[1]
    assert report.scale_free_slope == pytest.approx(expected, rel=1e-4)


def test_shuffled_labels_are_read_as_the_vector_was(session):
    from nblens.session import Session

    vector = session.extract("v", PAIRS, read="mean", layers=[1], progress=False)
    extractor = Session._extractor(session)
    spec = extractor._spec(PAIRS, method="mean_diff", site="resid_post", read=vector.read, chat=False)
    assert spec.left_out == (1, 2, 3)
    spec = extractor._spec(PAIRS, method="mean_diff", site="resid_post", read="mean+special", chat=False)
    assert spec.left_out is None


def test_a_mean_of_nothing_is_refused_with_what_would_do(session):
    with pytest.raises(
        UserError, match=r"pair 2: the mean leaves out .* at mean one of the texts, of 2 tokens, has no"
    ):
        session.extract("v", [("the cat", "a dog"), ("<s></s>", "no")], read="mean", progress=False)
    with pytest.warns(RuntimeWarning, match="carries more than half"):
        session.extract("v", [("<s></s> a", "<s></s> b")], read="mean+special", progress=False)


@pytest.mark.parametrize(
    ("ids", "span", "left_out", "positions"),
    [
        ((7, 8, 9), (0, 3), (), [1, 2]),
        ((7, 8, 9), (0, 3), None, [0, 1, 2]),
        ((7, 8, 9), (1, 3), (8,), [2]),
        ((7, 8, 9), (0, 2), (8,), []),
        ((7, 8, 9), (1, 2), (8,), [1]),
    ],
)
def test_the_positions_of_a_mean(ids, span, left_out, positions):
    assert mean_positions(ids, span, left_out) == positions


@pytest.mark.parametrize("read", ["mean+special", "3-7+special", "-3--1+special"])
def test_a_name_says_what_is_taken_in_and_can_be_given_again(read):
    assert read_name(read) == read
    assert read_span(read, 20) == read_span(read.removesuffix("+special"), 20)
    assert read_words(read) == f"{read.removesuffix('+special')} with special tokens"


@pytest.mark.parametrize(
    "read", ["last+special", "label+special", "+special", "x+special", "mean+special+special", "3+special"]
)
def test_only_a_mean_takes_in_more(read):
    with pytest.raises(UserError, match=f"read position '{re.escape(read)}' is unknown"):
        read_span(read, 20)


def test_a_report_says_what_its_mean_leaves_out():
    assert "read mean without special and first tokens" in repr(made_up_report(read="mean"))
    assert "read last, norm" in repr(made_up_report(read="last"))


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize(
    ("lengths", "carrier"),
    [((1, 1, 1, 1, 5), 4), ((1, 5, 1, 1, 1), 1), ((2, 1, 2, 1, 2), -1), ((3, 4), -1), ((1, 5), 1), ((9,), -1)],
)
def test_a_token_carries_a_mean_that_is_longer_than_all_others_together(lengths, carrier, width):
    """However many steps the text is fed in; of two tokens one always is, and has to be four times as long."""
    n = len(lengths)
    batch = Batch.of([[3] * n, [3] * 5], 2, torch.device("cpu"))
    hidden = torch.zeros(2, 5, D_MODEL)
    hidden[1] = 1.0
    for place, length in enumerate(lengths):
        hidden[0, 5 - n + place, place % 2] = length
    reader = SpanReader(1, batch, [(0, n), (0, 5)])
    for start in range(0, 5, width):
        reader.begin(range(start, min(5, start + width)))
        reader.writer(0)(hidden[:, start : start + width])
    (total, position), (other, none) = reader.lengths()[0].tolist()
    assert (round(total, 4), position) == (round(sum(lengths) / n, 4), carrier)
    assert (round(other, 4), none) == (round(D_MODEL**0.5, 4), -1)


def test_a_sentence_piece_beginning_is_left_out_like_any(attach):
    tokenizer = byte_fallback("both")
    session = attach(endless_model("llama", vocab_size=len(tokenizer)), tokenizer)
    pairs = [("the cat", "the dog")]
    vector = session.extract("v", pairs, read="mean", progress=False)
    sides = []
    for text in pairs[0]:
        ids = tuple(tokenizer(text)["input_ids"])
        _, states = states_of(session, text, ids)
        sides.append(states[:, 1 : len(ids) - 1].mean(1))  # neither beginning nor end
    assert_near(vector, sides[0] - sides[1])
