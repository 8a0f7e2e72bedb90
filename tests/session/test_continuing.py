"""Targets and answers continue the prompt, in every call that takes some; a plain pass says what comes next."""

import numpy as np
import pytest
import torch
from every_tokenizer import byte_fallback, byte_level, word_piece
from steered_runs import direction, endless_model
from tiny_models import N_BLOCKS

import nblens
from nblens import Sample, SteeringVector, UserError
from nblens.session import Session, inside

PROMPT = "the cat is"
KINDS = {"byte level": byte_level, "byte fallback": byte_fallback, "word piece": word_piece}


def session_of(attach, kind):
    tokenizer = kind()
    session = attach(endless_model("llama", vocab_size=len(tokenizer)), tokenizer)
    directions = {block: direction(block) for block in range(N_BLOCKS)}
    session.vectors["v"] = SteeringVector("v", directions, layers=(1,), n_blocks=N_BLOCKS)
    return session


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def session(attach, request):
    return session_of(attach, request.param)


@pytest.fixture
def level(attach):
    return session_of(attach, byte_level)


def last_of(session, text):
    """The token with which a text ends."""
    return session.tokenizer(text, add_special_tokens=False)["input_ids"][-1]


def logprobs_after(session, text):
    """What a plain pass says comes next."""
    ids = session.lens(text, layers=-1).token_ids.tolist()
    with torch.no_grad():
        return session.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def test_every_call_follows_the_token_that_comes_next(session):
    paris = last_of(session, f"{PROMPT} Paris")
    ids = session.lens(PROMPT).token_ids.tolist()
    read = session.lens(PROMPT, targets=["Paris"])
    assert read.target_ids.tolist() == [paris]
    expected = float(logprobs_after(session, PROMPT)[paris])
    assert float(read.target_logprobs[-1, -1, 0]) == pytest.approx(expected, abs=1e-4)
    assert session.lens(ids, targets="Paris").target_ids.tolist() == [paris]
    assert session.lens([PROMPT, "the dog"], targets="Paris")[1].target_ids.tolist() == [paris]
    assert session.compare(PROMPT, steer={"v": 1.0}, targets="Paris").steered.target_ids.tolist() == [paris]
    assert session.generate(PROMPT, 2, lens={"targets": "Paris"}).trajectory.target_ids.tolist() == [paris]
    assert session.attribute(PROMPT, "Paris").target_ids == (paris,)
    assert session.attribute(PROMPT, "Paris", max_new_tokens=2).target_ids == (paris,)


def test_what_is_said_exactly_stays_what_it_is(level):
    name = level.tokenizer.convert_tokens_to_ids
    for given, token_id in [(" Paris", name("ĠParis")), ("Ġmat", name("Ġmat")), (7, 7), ("⟨E9⟩", name("é"))]:
        assert level.lens(PROMPT, targets=[given]).target_ids.tolist() == [token_id]
        assert level.lens(f"{PROMPT} (", targets=[given]).target_ids.tolist() == [token_id]


def test_prompts_after_which_a_target_is_another_token_are_named(level):
    with_space, without = last_of(level, "the mat"), last_of(level, "(mat")
    told = (
        rf"target 'mat' is ' mat' \(id {with_space}\) after prompt 1 and 'mat' \(id {without}\) after prompt 3; give an"
    )
    with pytest.raises(UserError, match=told):
        level.lens([PROMPT, "the dog", f"{PROMPT} ("], targets=[5, "mat"])
    with pytest.raises(UserError, match=r"after prompt 2, target 'Paris' is 2 tokens \('Par' \+ 'is'\)"):
        level.lens([PROMPT, "the ("], targets=["Paris"])
    with pytest.raises(UserError, match=r"^target ' xis' is 3 tokens"):
        level.lens(PROMPT, targets=["xis"])
    both = level.lens([PROMPT, f"{PROMPT} ("], targets=[" mat", without])
    assert [row.target_ids.tolist() for row in both] == [[with_space, without]] * 2


def test_in_a_conversation_it_follows_what_the_template_ends_with(level):
    asked = [{"role": "user", "content": "the cat"}]
    level.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{{ end }}{% endif %}"
    )
    try:
        for end, follows in (("", " mat"), ("\n", "mat"), ("</s>", "mat")):
            mat = last_of(level, f"({follows}")
            assert level.lens(asked, chat={"end": end}, targets="mat").target_ids.tolist() == [mat]
            sweep = level.sweep(asked, "v", [1.0], 1, answers=("mat", "no"), chat={"end": end})
            assert (sweep.answers[0], sweep.answer_ids[0]) == (follows, (mat,))
        begun = [*asked, {"role": "assistant", "content": "the"}]
        options = {
            "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
            "continue_final_message": True,
        }
        assert level.lens(begun, chat=options, targets="mat").target_ids.tolist() == [last_of(level, "the mat")]
    finally:
        level.tokenizer.chat_template = None


def test_answers_of_any_length_continue_the_prompt_wherever_they_are_scored(session):
    sweep = session.sweep(PROMPT, "v", [-1.0, 0.0], 1, answers=("Paris", " Rome"))
    assert sweep.answers == (" Paris", " Rome")
    ids = [last_of(session, f"{PROMPT} {word}") for word in ("Paris", "Rome")]
    assert sweep.answer_ids == tuple((token_id,) for token_id in ids)
    logprobs = logprobs_after(session, PROMPT)
    assert sweep.propensities[1] == pytest.approx(float(logprobs[ids[0]] - logprobs[ids[1]]), abs=1e-4)
    given = [Sample(PROMPT, "Paris is the", "Rome is the"), Sample("the cat (", "A", "R")]
    exact = [Sample(PROMPT, " Paris is the", " Rome is the"), Sample("the cat (", "A", "R")]
    build, _ = inside(session)
    assert build.answers(given, chat=False) == build.answers(exact, chat=False)
    one, other = (session.steerability("v", s, controls=False, neutral=[], progress=False) for s in (given, exact))
    assert np.array_equal(one.dose_response.values, other.dose_response.values)


@pytest.mark.parametrize("read", ["label", "last", "mean+special"])
def test_a_vector_is_made_of_the_text_that_it_is_measured_on(session, read):
    pairs = [Sample(PROMPT, "Paris", "Rome"), Sample("the dog:", "yes", "no")]
    exact = [Sample(PROMPT, " Paris", " Rome"), Sample("the dog:", " yes", " no")]
    extractor = Session._extractor(session)
    options = {"method": "mean_diff", "site": "resid_post", "read": read, "chat": False}
    assert extractor._spec(pairs, **options) == extractor._spec(exact, **options)
    (answered, _) = inside(session)[0].answers(pairs, chat=False)
    assert extractor._spec(pairs, **options).positive[0] == answered.ids[0]


def test_under_chat_both_are_made_of_what_follows_the_template(level):
    level.tokenizer.chat_template = "{{ messages[0].content }}\na:"
    try:
        pairs = [Sample("the cat", "mat", "no"), Sample("the dog", "no", "mat")]
        (answered, _) = inside(level)[0].answers(pairs, chat=True)
        assert answered.texts == (" mat", " no")
        for read in ("last", "label"):
            options = {"method": "mean_diff", "site": "resid_post", "read": read, "chat": True}
            spec = Session._extractor(level)._spec(pairs, **options)
            assert (spec.positive[0], spec.negative[0]) == answered.ids
    finally:
        level.tokenizer.chat_template = None


def test_answers_that_say_their_space_are_left_alone(level):
    build, _ = inside(level)
    for prompt, answers in [("the cat?", (" (A)", " (R)")), ("the cat?", ("(A)", "(R)")), ("the cat? (", ("A", "R"))]:
        (answered,) = build.answers([Sample(prompt, *answers)], chat=False)
        assert answered.texts == answers
        assert level.tokenizer.decode(answered.ids[0]) == prompt + answers[0]


def test_the_token_taken_is_shown_with_its_space(level, tmp_path):
    followed = level.lens(PROMPT, targets=["Paris", 7, "mat"])
    said = f"following ·Paris, {nblens.text.visible(followed.token_text(7))}, ·mat"
    assert said in repr(followed)
    assert said in followed.to_html()
    assert said in nblens.Trajectory.load(followed.save(tmp_path / "t.safetensors")).circumstances.facts
    assert "following" not in repr(level.lens(PROMPT))
    assert repr(level.attribute(PROMPT, ["Paris", "mat"])).startswith(
        "Attribution(·Paris, ·mat over 3 layers × 3 tokens"
    )
    many = level.lens(PROMPT, targets=list(range(100, 120)))
    assert many.circumstances.facts[-1].endswith(" and 17 more")
    lines = {line.get_label() for line in followed.plot_tokens(["Paris"]).axes[0].lines}
    assert len(lines) == 1
    assert [text.get_text() for text in followed.plot_tokens(["Paris"]).axes[0].texts] == ["·Paris"]
