"""Arguments mean the same in every method of `Session`: how text goes on, how far, at which sites, written how."""

import inspect

import numpy as np
import pytest
import torch
from steered_runs import direction, endless_model
from tiny_models import N_BLOCKS, prompt_ids, tiny_tokenizer
from transformers import GenerationConfig

from nblens import Sample, Session, SteeringVector, UserError
from nblens.model.tokens import TokenTexts
from nblens.options import CaptureOptions, GenerateOptions, LensOptions, SamplingOptions

PROMPT = prompt_ids(7, 1)
PAIRS = [("the cat sat", "a dog"), ("one day", "her house")]


@pytest.fixture
def session(attach):
    session = attach(endless_model("llama"))
    session.vectors["v"] = SteeringVector("v", dict.fromkeys(range(N_BLOCKS), direction(0)), layers=(1,))
    return session


def one_line(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    return caught.value


# options of generation ------------------------------------------------------------------------------------------------


def continued(session, **options):
    """The text of the tokens that each method feeds when it goes on for six in the same way."""
    (swept,) = session.sweep(PROMPT, "v", [1.0], 6, **options)
    steered = {"steer": {"v": 1.0}, **options}
    text_of = TokenTexts(session.tokenizer)
    return {
        "generate": [text_of(i) for i in session.generate(PROMPT, 6, **steered).token_ids[:-1]],
        "sweep": [text_of(i) for i in swept.token_ids[:-1]],
        "lens": list(session.lens(PROMPT, max_new_tokens=6, **steered).tokens[len(PROMPT) :]),
        "compare": list(session.compare(PROMPT, max_new_tokens=6, **steered).steered.tokens[len(PROMPT) :]),
        "attribute": list(session.attribute(PROMPT, [9], max_new_tokens=6, **steered).tokens[len(PROMPT) :]),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 5.0},
        {"temperature": 3.0, "seed": 4, "top_p": 0.5},
        {"suppress_tokens": list(range(150))},
    ],
    ids=["repetition_penalty", "top_p", "suppress_tokens"],
)
def test_an_option_of_generation_does_the_same_wherever_text_is_written(session, options):
    fed = continued(session, **options)
    assert fed["generate"] != continued(session)["generate"], "the option made no difference"
    assert len({tuple(tokens) for tokens in fed.values()}) == 1, fed


def test_a_stop_string_ends_every_run(session):
    text = session.generate(PROMPT, 6).text
    stop = tiny_tokenizer().decode(session.generate(PROMPT, 6).token_ids[:1])
    assert stop
    assert text.startswith(stop)
    ends = {"stop_strings": stop, "steer": {}}
    assert len(session.generate(PROMPT, 6, **ends).token_ids) == 1
    assert session.lens(PROMPT, max_new_tokens=6, **ends).n_tokens == len(PROMPT)
    assert session.capture(PROMPT, max_new_tokens=6, **ends).shape[1] == len(PROMPT)
    assert len(session.attribute(PROMPT, [9], max_new_tokens=6, **ends).tokens) == len(PROMPT)


def test_activations_are_those_of_the_text_that_the_options_made(session):
    options = {"repetition_penalty": 5.0}
    ids = session.generate(PROMPT, 4, **options).token_ids
    acts = session.capture(PROMPT, max_new_tokens=4, **options)
    assert torch.allclose(acts, session.capture([*PROMPT, *ids[:-1]]), atol=1e-3)
    assert not torch.allclose(acts, session.capture(PROMPT, max_new_tokens=4), atol=1e-1)


RUNS = {
    "lens": lambda s, **options: s.lens(PROMPT, **options),
    "attribute": lambda s, **options: s.attribute(PROMPT, [9], **options),
    "compare": lambda s, **options: s.compare(PROMPT, steer={"v": 1.0}, **options),
    "capture": lambda s, **options: s.capture(PROMPT, **options),
}
WRITERS = {
    "generate": lambda s, **options: s.generate(PROMPT, 2, **options),
    "sweep": lambda s, **options: s.sweep(PROMPT, "v", [1.0], 2, **options),
}


@pytest.mark.parametrize("method", RUNS)
def test_options_of_generation_without_generation_are_refused(session, method):
    message = f"^{method} option 'top_p' is one of generation, which needs max_new_tokens=N$"
    one_line(lambda: RUNS[method](session, top_p=0.9), message)
    one_line(lambda: RUNS[method](session, top_p=0.9, max_new_tokens=0), message)
    RUNS[method](session, top_p=0.9, max_new_tokens=1)


@pytest.mark.parametrize("method", [*RUNS, *WRITERS])
def test_an_unknown_option_is_refused_by_name_as_a_keyword_of_the_session(session, method):
    call = {**RUNS, **WRITERS}[method]
    message = rf"^Session\.{method}\(\) got an unexpected keyword argument 'top_q': option 'top_q' is unknown to trans"
    assert isinstance(one_line(lambda: call(session, top_q=0.9), message), TypeError)
    if method in RUNS:
        one_line(lambda: call(session, top_q=0.9, max_new_tokens=2), message)


def test_what_type_checkers_are_told_of_generation_is_transformers_own():
    assert set(SamplingOptions.__annotations__) <= set(GenerationConfig().to_dict())


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        ("lens", LensOptions, {"prompt", "sites"}),
        ("generate", GenerateOptions, {"prompt", "max_new_tokens"}),
        ("capture", CaptureOptions, {"prompt", "sites", "to"}),
    ],
)
def test_what_type_checkers_are_told_of_a_method_is_its_signature(method, options, named):
    parameters = inspect.signature(getattr(Session, method)).parameters
    told = {name for name in options.__annotations__ if name not in SamplingOptions.__annotations__}
    told |= {"top_k"} if method == "lens" else set()
    assert told | named == set(parameters) - {"self", "options"}


# max_new_tokens and generate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", RUNS)
def test_generate_is_another_name_of_max_new_tokens(session, method):
    one, other = RUNS[method](session, generate=3), RUNS[method](session, max_new_tokens=3)
    of = {"compare": lambda c: c.steered.top_logprobs, "lens": lambda t: t.top_logprobs}
    of |= {"attribute": lambda a: a.logits, "capture": lambda acts: acts.numpy()}
    np.testing.assert_array_equal(of[method](one), of[method](other))
    assert of[method](one).shape != of[method](RUNS[method](session)).shape


@pytest.mark.parametrize("method", RUNS)
def test_both_names_at_once_are_refused(session, method):
    message = f"^{method} got max_new_tokens=3 and generate=2, which mean the same; give one of them$"
    one_line(lambda: RUNS[method](session, max_new_tokens=3, generate=2), message)


# site and sites -------------------------------------------------------------------------------------------------------


def test_one_site_may_be_given_under_either_name(session):
    by_sites, by_site = (session.lens(PROMPT, **{name: "mlp_out"}) for name in ("sites", "site"))
    assert by_sites.site == by_site.site == "mlp_out"
    assert torch.equal(session.capture(PROMPT, site="mlp_out"), session.capture(PROMPT, sites="mlp_out"))
    for site in ({"site": "mlp_out"}, {"sites": "mlp_out"}, {"sites": ["mlp_out"]}):
        assert session.compare(PROMPT, steer={"v": 1.0}, **site).steered.site == "mlp_out"
        assert session.extract("x", PAIRS, **site).site == "mlp_out"
    assert session.generate(PROMPT, 2, lens={"site": "mlp_out"}).trajectory.site == "mlp_out"
    samples = [Sample(f"the {n}", " dog", " man") for n in range(8)]
    quick = {"controls": False, "neutral": [], "progress": False}
    assert session.steering_experiment("e", samples, (-1, 1), sites="resid_pre", **quick).site == "resid_pre"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.lens(PROMPT, sites="attn_out", site="mlp_out"), "lens got sites='attn_out' and site='mlp_out'"),
        (
            lambda s: s.capture(PROMPT, sites=["attn_out"], site="mlp_out"),
            r"capture got sites=\['attn_out'\] and site=",
        ),
        (lambda s: s.compare(PROMPT, site="attn_out", sites="mlp_out"), "compare got site='attn_out' and sites='mlp_"),
        (lambda s: s.extract("x", PAIRS, site="attn_out", sites="mlp_out"), "extract got site='attn_out' and sites="),
        (lambda s: s.lens(PROMPT, site=["attn_out", "mlp_out"]), r"lens takes one site here.*got \['attn_out', 'mlp_"),
        (lambda s: s.compare(PROMPT, sites=["attn_out", "mlp_out"]), r"compare takes one site here.*got \['attn_out'"),
        (lambda s: s.extract("x", PAIRS, sites=["attn_out", "mlp_out"]), "extract takes one site here"),
        (lambda s: s.extract("x", PAIRS, sites=[]), r"extract takes one site here.*got \[\]"),
        (lambda s: s.compare(PROMPT, site=None), "compare takes one site here.*got None"),
    ],
)
def test_two_sites_where_one_is_meant_are_refused(session, call, message):
    one_line(lambda: call(session), message)


# write and op of a new vector -----------------------------------------------------------------------------------------


def test_a_vector_is_made_with_the_way_it_is_written(session):
    plain = session.extract("plain", PAIRS)
    made = session.extract("made", PAIRS, write=(4, 10), op="ablate")
    assert (plain.write, plain.op) == ("all", "add")
    assert (made.write, made.op) == (session.vectors["made"].write, session.vectors["made"].op) == ("4-9", "ablate")
    np.testing.assert_array_equal(made.directions[1], plain.directions[1])
    assert session.vectors["made"].op == "ablate"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"write": "here"}, "'here' is unknown"),
        ({"op": "multiply"}, "'multiply' is unknown"),
        ({"site": "resid_mid", "op": "ablate"}, "'x' cannot ablate at resid_mid"),
    ],
)
def test_a_way_that_no_run_would_write_is_refused_before_the_model_runs(session, options, message):
    passes = []
    with session.model.register_forward_pre_hook(lambda *args: passes.append(args)):
        one_line(lambda: session.extract("x", PAIRS, **options), message)
    assert not passes
    assert "x" not in session.vectors
