"""Texts of a session whose tokenizer is not the built-in one's: what is fed, what is counted, and what is shown."""

import warnings

import numpy as np
import pytest
import torch
from every_tokenizer import byte_fallback, byte_level, word_piece
from steered_runs import direction, endless_model
from tiny_models import N_BLOCKS, tiny_model
from transformers import PreTrainedTokenizerFast

import nblens
from nblens import SteeringVector, UserError
from nblens.jupyter.panel.live_text import LiveRequest, LiveRunner
from nblens.session import Session, inside

TEXT = "the cat sat on the mat."
ENDING = byte_fallback("both")
END = ENDING.eos_token_id


@pytest.fixture
def session(attach):
    """A tokenizer that puts a beginning before a text and an end after it."""
    session = attach(endless_model("llama", vocab_size=len(ENDING)), ENDING)
    session.vectors["v"] = SteeringVector(
        "v", {b: direction(b) for b in range(N_BLOCKS)}, layers=(1,), n_blocks=N_BLOCKS
    )
    return session


def own(text):
    return (ENDING.bos_token_id, *ENDING(text, add_special_tokens=False)["input_ids"])


def logprobs_of(session, ids):
    """Log-probabilities of what follows each token, by one plain pass."""
    with torch.no_grad():
        return session.model(torch.tensor([ids])).logits[0].log_softmax(-1)


def test_every_kind_of_text_ends_where_it_ends(session):
    build, _ = inside(session)
    assert tuple(session.lens(TEXT, layers=-1).token_ids) == own(TEXT)
    assert session.capture([TEXT, "the"], layers=0)[0].shape[1] == len(own(TEXT))
    assert build.text_ids(TEXT, 100) == own(TEXT)
    fit = build.fit([TEXT, "the dog", "the mat"], "tuned", 1, None, 64, 0)
    assert (*fit.texts, *fit.held_out) == (own(TEXT), own("the dog"), own("the mat"))
    pairs = [("the cat", "the dog"), nblens.Sample("the", " cat", " dog")]
    spec = Session._extractor(session)._spec(pairs, method="mean_diff", site="resid_post", read="last", chat=False)
    assert spec.positive == (own("the cat"),) * 2
    assert spec.negative == (own("the dog"),) * 2
    assert spec.positive_spans == ((2, 3),) * 2
    (answered,) = build.answers([nblens.Sample(TEXT, " yes", " no")], chat=False)
    assert answered.ids == (own(f"{TEXT} yes"), own(f"{TEXT} no"))


def test_propensity_counts_the_answers_and_no_end_after_them(session):
    sweep = session.sweep(TEXT, "v", [-1.0, 0.0], 1, answers=(" yes.", " no"))
    ids = own(TEXT)
    expected = 0.0
    for sign, answer in ((1, " yes."), (-1, " no")):
        whole = own(TEXT + answer)
        logprobs = logprobs_of(session, whole)
        expected += sign * sum(float(logprobs[i - 1, whole[i]]) for i in range(len(ids), len(whole)))
    assert sweep.propensities[1] == pytest.approx(expected, abs=1e-4)


def test_text_goes_on_behind_the_prompt_and_joins_to_it(session):
    out = session.generate(TEXT, 12)
    ids = [*own(TEXT), *out.token_ids]
    assert list(out.token_ids) == list(plain_greedy(session, own(TEXT), 12))
    whole = ENDING.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert out.prompt == TEXT
    assert out.prompt + out.text == whole
    both = session.compare(TEXT, steer={"v": 0.0}, generate=12)
    assert (both.base_text, both.steered_text) == (out.text, out.text)


def plain_greedy(session, ids, n):
    ids = list(ids)
    for _ in range(n):
        ids.append(int(logprobs_of(session, ids)[-1].argmax()))
    return ids[-n:]


def test_text_that_begins_with_a_space_keeps_it(session):
    """The next token is made to be a word with its space."""
    word = ENDING.convert_tokens_to_ids("▁Paris")
    with torch.no_grad():
        session.model.lm_head.weight.zero_()
        last = session.capture("the cat", layers=-1)[0, -1]
        session.model.lm_head.weight[word] = session.model.model.norm(last)
    out = session.generate("the cat", 1)
    assert (out.token_ids, out.text) == ((word,), " Paris")
    assert session.sweep("the cat", "v", [0.0, 1.0], 1)[0].text == " Paris"
    assert session.compare("the cat", steer={"v": 0.0}, generate=1).base_text == " Paris"
    told = []
    runner = LiveRunner(session, told.append, threaded=False)
    runner.submit(LiveRequest("the cat", max_new_tokens=1))
    assert (told[-1].state, told[-1].base, told[-1].steered) == ("done", " Paris", " Paris")


def test_tokens_that_make_a_character_together_are_one_in_a_trajectorys_text(attach, tmp_path):
    tokenizer = byte_level()
    session = attach(endless_model("llama", vocab_size=len(tokenizer)), tokenizer)
    traj = session.lens("é 😀 the", layers=-1, top_k=1)
    assert traj.text == "é 😀 the"
    assert traj.tokens[:2] == ("⟨C3⟩", "⟨A9⟩")
    assert traj.truncated(1).text == "\N{REPLACEMENT CHARACTER}"
    assert traj.truncated(2).text == "é"
    assert nblens.Trajectory.load(traj.save(tmp_path / "t.safetensors")).text == traj.text
    assert session.lens("the Ã", layers=-1).text == "the Ã"


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
def test_a_token_that_holds_part_of_a_character_says_of_which(attach, tmp_path, kind):
    tokenizer = kind("none")
    session = attach(endless_model("llama", vocab_size=len(tokenizer)), tokenizer)
    traj = session.lens("the 那é. 😀", layers=-1, top_k=1)
    parts = [(token, whole) for token, whole in zip(traj.tokens, traj.characters, strict=True) if whole]
    assert parts == [(f"⟨{byte:02X}⟩", whole) for whole in "那é😀" for byte in whole.encode()]
    place = traj.characters.index("那")
    assert set(traj.truncated(place + 2).characters) == {""}  # the rest of it is not there
    assert nblens.Trajectory.load(traj.save(tmp_path / "t.safetensors")).characters == traj.characters
    page = traj.to_html()
    assert f'title="⟨82⟩ of 那 (id {traj.token_ids[place + 1]}), token {place + 1}"' in page  # the column's own token
    assert f'title="⟨82⟩ of 那 (id {traj.token_ids[place + 1]}), token {place}"' in page  # and what follows
    assert f'title="⟨E9⟩ of 那 (id {traj.token_ids[place]}), token {place - 1}"' in page
    assert "⟨82⟩ of" not in session.lens(traj.token_ids[place + 1 : place + 2], layers=-1).to_html()


def test_a_trajectory_of_a_file_from_before_bytes_still_loads(attach, tmp_path):
    import json

    from nblens.files import read_safetensors, write_safetensors

    tokenizer = byte_level()
    session = attach(endless_model("llama", vocab_size=len(tokenizer)), tokenizer)
    path = session.lens("é", layers=-1).save(tmp_path / "t.safetensors")
    arrays, metadata = read_safetensors(path)
    fields = json.loads(metadata["fields"])
    del fields["bytes_of_tokens"]
    write_safetensors(path, arrays, {**metadata, "fields": json.dumps(fields)})
    assert nblens.Trajectory.load(path).text == "⟨C3⟩⟨A9⟩"


@pytest.fixture
def smaller(attach):
    """A model that lacks the last of its tokenizer's tokens."""
    size = ENDING.convert_tokens_to_ids("▁Paris")
    return attach(endless_model("llama", vocab_size=size), ENDING)


def test_a_token_that_the_model_lacks_is_refused_wherever_it_comes_from(smaller):
    lacking = "'▁Paris', which has id .* in the tokenizer and is outside the model's vocabulary"
    calls = {
        "target": lambda: smaller.lens("the", targets=["Paris"]),
        "attributed": lambda: smaller.attribute("the", "Paris"),
        "prompt": lambda: smaller.lens("the Paris"),
        "captured": lambda: smaller.capture("the Paris"),
        "generated": lambda: smaller.generate("the Paris", 1),
        "pair": lambda: smaller.extract("v", [("the Paris", "the cat")], progress=False),
        "fit": lambda: smaller.fit_lens(["the Paris", "the"], steps=1, progress=False),
        "answer": lambda: inside(smaller)[0].answers([nblens.Sample("the", " Paris", " cat")], chat=False),
    }
    for call in calls.values():
        with pytest.raises(UserError, match=lacking):
            call()
    beyond = smaller.architecture.vocab_size
    for call in (lambda: smaller.lens([3, beyond]), lambda: smaller.capture([[beyond]])):
        with pytest.raises(UserError, match=f"token id {beyond} is outside the vocabulary"):
            call()
    with pytest.raises(UserError, match=f"target id {beyond} is outside the vocabulary"):
        smaller.lens("the", targets=[beyond])
    assert len(smaller.generate("the", 4, stop_strings=["Paris", " Rome"]).token_ids) == 4


def test_rows_are_filled_with_a_token_that_the_model_has(attach):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=ENDING.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= len(ENDING)
    session = attach(tiny_model("llama", vocab_size=len(ENDING)), tokenizer)
    alone, together = session.lens("the", layers=-1), session.lens(["the", TEXT], layers=-1)[0]
    np.testing.assert_allclose(together.top_logprobs, alone.top_logprobs, atol=1e-4)


def test_a_warning_about_a_text_names_the_callers_line(session):
    with pytest.warns(RuntimeWarning, match="begins with '<s>' twice") as caught:
        session.lens(" <s>the cat", layers=-1)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.lens("<s>the cat", layers=-1)


def test_a_word_piece_text_ends_without_its_separator(attach):
    tokenizer = word_piece("both")
    session = attach(endless_model("llama", vocab_size=len(tokenizer)), tokenizer)
    traj = session.lens("the cat", layers=-1)
    assert tokenizer.convert_ids_to_tokens(traj.token_ids) == ["[CLS]", "the", "cat"]
    out = session.generate("the cat", 6)
    ids = [*traj.token_ids.tolist(), *out.token_ids]
    assert out.prompt + out.text == tokenizer.decode(ids, skip_special_tokens=True)
