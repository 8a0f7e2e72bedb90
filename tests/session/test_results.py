"""What a lens and a generation give: shapes, targets, seeds, metrics, seconds, chat prompts."""

import itertools
import json

import numpy as np
import pytest
import torch
from sessions import PROMPT, TEXT, plain
from steered_runs import endless_model
from tiny_models import tiny_tokenizer

from nblens import Generation, Measurement, Sample, Steer, Trajectory, UserError


def test_one_prompt_gives_one_result_and_a_list_gives_a_list(session):
    one = session.lens(TEXT)
    assert isinstance(one, Trajectory)
    assert isinstance(session.lens([TEXT]), list)
    both = session.lens([TEXT, "the dog"])
    assert [type(t) for t in both] == [Trajectory, Trajectory]
    assert both[0].tokens == one.tokens
    assert isinstance(session.generate(TEXT, 2), Generation)
    assert [type(g) for g in session.generate([TEXT, "the dog"], 2)] == [Generation, Generation]
    assert isinstance(session.capture(TEXT), torch.Tensor)
    assert [a.shape[1] for a in session.capture([TEXT, "the dog"])] == [one.n_tokens, both[1].n_tokens]


def test_several_sites_give_a_dict_by_site(session):
    by_site = session.lens(TEXT, sites=["resid_pre", "resid_post"])
    assert list(by_site) == ["resid_pre", "resid_post"]
    assert {site: t.site for site, t in by_site.items()} == {"resid_pre": "resid_pre", "resid_post": "resid_post"}
    assert list(json.loads(by_site.to_json())["tokens"][0]["layers"]["0"]) == ["resid_pre", "block"]
    batch = session.lens([TEXT, "the dog"], sites=["resid_pre", "resid_post"])
    assert [set(row.to_frame()["site"]) for row in batch] == [{"resid_pre", "resid_post"}] * 2
    generated = session.generate(TEXT, 2, lens={"sites": ["resid_pre", "resid_post"]})
    assert set(generated.trajectories.to_frame()["site"]) == {"resid_pre", "resid_post"}
    assert session.generate(TEXT, 2).trajectories == {}
    assert list(session.lens(TEXT, sites=["resid_pre"])) == ["resid_pre"]
    acts = session.capture([TEXT, "the dog"], sites=("resid_pre", "resid_post"))
    assert [list(row) for row in acts] == [["resid_pre", "resid_post"]] * 2


def test_token_ids_are_a_prompt_as_good_as_text(session):
    ids = tiny_tokenizer()(TEXT)["input_ids"]
    expected = session.lens(TEXT).top_ids
    for prompt in (ids, tuple(ids), np.array(ids), torch.tensor(ids)):
        np.testing.assert_array_equal(session.lens(prompt).top_ids, expected)
    assert len(session.lens([ids, ids[:2]])) == 2


def test_a_setting_that_can_be_read_once_is_read_as_if_it_were_a_list(session):
    def steer(once):
        return iter([Steer("v", 40.0)]) if once else [Steer("v", 40.0)]

    once, again = (session.generate(PROMPT, 3, steer=steer(kind)) for kind in (True, False))
    assert once.steer == again.steer == {"v": 40.0}
    assert once.token_ids == again.token_ids
    targets = [session.attribute(PROMPT, steer=steer(kind)).target_ids for kind in (True, False)]
    assert targets[0] == targets[1] != session.attribute(PROMPT, steer={}).target_ids


def test_coefficients_that_can_be_read_once_are_read_as_if_they_were_a_list(session):
    coefficients, samples = [-4.0, 0.0, 4.0], [Sample(TEXT, " cat", " dog")] * 2
    texts, reports = [], []
    for given in (list, iter, tuple, np.array):
        texts.append([out.token_ids for out in session.sweep(PROMPT, "v", given(coefficients), 3)])
        report = session.steerability(
            "v", (iter if given is iter else list)(samples), given(coefficients), n_random=0, progress=False
        )
        reports.append(report.dose_response.slopes.tolist())
    assert len(texts[0]) == 3
    assert texts == [texts[0]] * 4
    assert reports == [reports[0]] * 4
    measured = Measurement(iter(coefficients))
    assert measured.coefficients == tuple(coefficients)


def test_a_generation_carries_what_it_was_made_of(session):
    out = session.generate(TEXT, 5, steer={"v": 0.5}, lens={"layers": "0,-1", "top_k": 3, "targets": [9]})
    assert out.prompt == TEXT
    assert out.steer == {"v": 0.5}
    assert not out.interrupted
    assert out.trajectory.layers == (0, 2)
    assert out.trajectory.top_ids.shape == (2, len(tiny_tokenizer()(TEXT)["input_ids"]) + 4, 3)
    assert out.trajectory.target_ids.tolist() == [9]
    assert out.trajectory.next_ids.tolist()[-5:] == list(out.token_ids)
    assert out.tokens_per_second > 0
    facts = "LlamaForCausalLM, float32, steered: v=0.5 at block 1"
    assert repr(out) == f"Generation({out.text!r}, {facts})"
    assert session.generate(TEXT, 2).trajectory is None


def test_the_lens_follows_targets_given_as_text_or_id(session):
    cat = tiny_tokenizer()(" cat", add_special_tokens=False)["input_ids"]
    assert len(cat) == 1
    traj = session.lens(PROMPT, targets=[" cat", 17])
    assert traj.target_ids.tolist() == [cat[0], 17]
    expected = plain(session, PROMPT, len(PROMPT)).log_probs[:, [cat[0], 17]]
    assert (torch.from_numpy(traj.target_logprobs[-1]) - expected).abs().max() <= 1e-4
    dog = tiny_tokenizer()(" dog", add_special_tokens=False)["input_ids"]
    assert session.lens(TEXT, targets="dog").target_ids.tolist() == dog  # as it continues the text
    assert session.lens(PROMPT, targets=17).target_ids.tolist() == [17]


def test_the_lens_of_a_generation_reads_what_was_fed(session):
    traj = session.lens(PROMPT, generate=4, layers=-1)
    assert traj.n_tokens == len(PROMPT) + 3
    assert traj.prompt_length == len(PROMPT)
    expected = plain(session, traj.token_ids.tolist(), len(PROMPT)).log_probs
    assert traj.next_ids[len(PROMPT) - 1 :].tolist() == expected[len(PROMPT) - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize("generate", [0, 3])
def test_seconds_are_counted_by_phase(session, generate):
    traj = session.lens(PROMPT, generate=generate)
    assert list(traj.timings) == ["prefill", "decode", "readout", "total"]
    assert (traj.timings["decode"] > 0) == (generate > 0)
    prefill, decode, readout, total = traj.timings.values()
    assert min(prefill, readout) > 0
    assert prefill + decode + readout <= total
    assert session.generate(PROMPT, 2).timings["readout"] == 0


def test_trials_are_one_batch_with_a_seed_each(session):
    options = {"generate": 6, "temperature": 2.0, "layers": -1}
    trials = session.lens([PROMPT] * 3, **options, seed=range(3))
    alone = [session.lens(PROMPT, **options, seed=seed) for seed in range(3)]
    assert [t.next_ids.tolist() for t in trials] == [t.next_ids.tolist() for t in alone]
    assert len({tuple(t.next_ids.tolist()) for t in trials}) == 3
    texts = [g.token_ids for g in session.generate([PROMPT] * 2, 6, temperature=2.0, seed=np.array([2, 1]))]
    assert texts == [session.generate(PROMPT, 6, temperature=2.0, seed=seed).token_ids for seed in (2, 1)]


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        ([1], r"seed must be one number, or one for each of the 2 rows; got 1 numbers"),
        ([], "got 0 numbers"),
        ([1, 2, 3], "got 3 numbers"),
        (itertools.count(), "got more numbers"),
        ([1, 2.5], r"seed must be a whole number, or one for each prompt, got \[1, 2.5\]"),
        (1.5, "seed must be a whole number, or one for each prompt, got 1.5"),
        ("12", "seed must be a whole number, or one for each prompt, got '12'"),
    ],
)
def test_seeds_that_do_not_fit_are_refused(session, seed, message):
    with pytest.raises(UserError, match=message):
        session.generate([PROMPT, PROMPT], 2, temperature=1.0, seed=seed)


def test_numbers_may_be_numpys(session):
    expected = session.generate(PROMPT, 3, temperature=0.5, seed=4).token_ids
    out = session.generate(PROMPT, np.int64(3), temperature=np.float32(0.5), seed=np.int64(4))
    assert out.token_ids == expected
    pairs = [("the cat sat", "a dog"), ("one day", "her house")]
    by_number = session.extract("x", pairs, read=np.int64(-1), layers=np.int64(1)).directions[1]
    np.testing.assert_array_equal(by_number, session.extract("y", pairs, read=-1, layers=1).directions[1])
    assert session.lens(PROMPT, top_k=np.int64(2), targets=np.int64(9)).top_ids.shape[2] == 2


def test_the_users_default_dtype_does_not_matter(session):
    pairs = [("the cat sat", "a dog"), ("one day", "her house")]

    def everything():
        return [
            session.extract("x", pairs, read="mean").directions[1],
            session.lens(PROMPT, generate=3, steer={"v": 1.5}, targets=[9]).top_logprobs,
            session.capture(PROMPT, steer={"v": 1.5}).numpy(),
            session.generate(PROMPT, 4, temperature=2.0, seed=1).token_ids,
        ]

    expected, before = everything(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for ours, normal in zip(everything(), expected, strict=True):
            np.testing.assert_allclose(ours, normal, atol=1e-3)
    finally:
        torch.set_default_dtype(before)


def with_template(template):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def test_a_chat_prompt_goes_through_the_template(attach):
    template = (
        "{% for m in messages %}the {{ m['content'] }} one{% endfor %}{% if add_generation_prompt %} day{% endif %}"
    )
    session = attach(endless_model("llama"), with_template(template))
    expected = tiny_tokenizer()("the cat one day", add_special_tokens=False)["input_ids"]
    assert session.lens("cat", chat=True).token_ids.tolist() == expected
    assert session.generate("cat", 2, chat=True).prompt == "the cat one day"


def test_only_the_asked_for_metrics_are_computed(session):
    everything, nothing = session.lens(PROMPT), session.lens(PROMPT, metrics=())
    assert np.isnan(nothing.entropy).all()
    assert np.isnan(nothing.kl_to_final).all()
    assert (nothing.next_rank == -1).all()
    for name in ("top_logprobs", "next_logprob"):
        np.testing.assert_allclose(getattr(nothing, name), getattr(everything, name), atol=1e-5)
    one = session.lens(PROMPT, metrics="entropy")
    np.testing.assert_allclose(one.entropy, everything.entropy, atol=1e-5)
    assert np.isnan(one.kl_to_final).all()
    with pytest.raises(UserError, match="metric 'entropi' is unknown; a lens computes entropy, kl, rank, or none"):
        session.lens(PROMPT, metrics=["entropi"])


def test_an_empty_dict_asks_for_the_lens_with_its_defaults(session):
    assert session.generate(PROMPT, 2, lens={}).trajectory is not None


def test_a_comparison_computes_only_the_asked_for_metrics(session):
    comparison = session.compare(PROMPT, steer={"v": 1.5}, metrics=())
    assert np.isnan(comparison.base.entropy).all()
    assert np.isnan(comparison.diff.metric("rank")).all()
    assert "nan" not in comparison.base.to_html()
