"""Generation is transformers' own with our loop inside: the same tokens, options and refusals."""

import copy
import logging

import numpy as np
import pytest
import torch
from steered_runs import PAD, STEERED_FAMILIES, endless_model, engine_of, hook_count
from tiny_models import VOCAB_SIZE, prompt_ids, tiny_tokenizer

from nblens import UserError
from nblens.engine.control import Control
from nblens.specs import GenerationSpec, RunSpec, TokensSampled

PROMPTS = [prompt_ids(5, 1), prompt_ids(9, 2), prompt_ids(3, 3)]
SEEDS = {"gpt2": 5, "gpt_neox": 3, "opt": 3, "falcon": 11, "gemma2": 3}
"""weights under which a family does not repeat one token for ever"""


def model_of(family):
    return endless_model(family, SEEDS.get(family, 0))


def transformers_tokens(model, prompts, eos=None, **options):
    """New tokens of each row by `model.generate`, cut behind the end-of-text token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": PAD, "eos_token_id": eos} | options
    rows = model.generate(ids, attention_mask=mask, **settings)[:, width:].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token == eos), len(row)) for row in rows]
    return [tuple(row[:end]) for row, end in zip(rows, ends, strict=True)]


def tokens(session, prompts, max_new_tokens=10, **options):
    return [out.token_ids for out in session.generate(prompts, max_new_tokens, **options)]


@pytest.mark.parametrize("family", STEERED_FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(3, 150))},
        {"sequence_bias": [[[40], 100.0], [[50], 100.0]]},
    ],
    ids=str,
)
def test_greedy_text_is_that_of_transformers_in_a_padded_batch(attach, family, options):
    model = model_of(family)
    expected = transformers_tokens(model, PROMPTS, **copy.deepcopy(options))
    assert tokens(attach(model), PROMPTS, **options) == expected
    if options:
        assert expected != transformers_tokens(model, PROMPTS)


@pytest.mark.parametrize("family", STEERED_FAMILIES)
def test_a_row_ends_at_the_checkpoints_end_of_text_token_while_others_go_on(attach, family):
    model = model_of(family)
    options = {"repetition_penalty": 1.5}
    free = transformers_tokens(model, PROMPTS, **options)
    ends = {token: [row.index(token) if token in row else 10 for row in free] for row in free for token in row}
    eos = max(ends, key=lambda token: (len(set(ends[token])), min(ends[token])))
    expected = transformers_tokens(model, PROMPTS, eos, **options)
    assert len(set(map(len, expected))) > 1
    model.generation_config.eos_token_id = eos
    assert tokens(attach(model), PROMPTS, **options) == expected


def test_any_of_several_end_of_text_tokens_ends_a_row(attach):
    model = model_of("llama")
    free = transformers_tokens(model, PROMPTS[:1])[0]
    model.generation_config.eos_token_id = [free[6], free[2]]
    assert tokens(attach(model), PROMPTS[:1]) == [free[:3]]


def test_min_new_tokens_keeps_a_row_from_ending(attach):
    model = model_of("llama")
    eos = transformers_tokens(model, PROMPTS)[1][2]
    expected = transformers_tokens(model, PROMPTS, eos, min_new_tokens=6)
    model.generation_config.eos_token_id = eos
    session = attach(model)
    assert len(tokens(session, PROMPTS)[1]) == 3
    assert tokens(session, PROMPTS, min_new_tokens=6) == expected
    assert min(map(len, expected)) >= 6


UNEQUAL = [prompt_ids(1, 4), *PROMPTS]
FEW = {"suppress_tokens": [token for token in range(VOCAB_SIZE) if token not in (PAD, *range(30, 50))]}
"""few tokens are left to choose among, padding's one of them"""


@pytest.mark.parametrize(
    "options",
    [
        {"min_length": 8},
        {"min_length": 10},
        {"forced_bos_token_id": 77},
        {"no_repeat_ngram_size": 1, **FEW},
        {"encoder_no_repeat_ngram_size": 1, **FEW},
        {"encoder_repetition_penalty": 9.0, **FEW},
        {"sequence_bias": [[[2, 2, UNEQUAL[0][0], 40], 100.0]]},
        {"bad_words_ids": [[2, 2, UNEQUAL[0][0], t] for t in range(3, 150)]},
        {"repetition_penalty": 9.0, **FEW},
        {"exponential_decay_length_penalty": (2, 3.0)},
        {"begin_suppress_tokens": list(range(3, 150))},
        {"min_new_tokens": 6},
        {"forced_eos_token_id": 60},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_means_for_a_padded_row_what_it_means_for_the_row_alone(attach, options):
    """Options that count what stands in a row, or look at it, see no padding."""
    model = model_of("llama")
    eos = transformers_tokens(model, UNEQUAL[:1])[0][2]
    expected = [transformers_tokens(model, [prompt], eos, **copy.deepcopy(options))[0] for prompt in UNEQUAL]
    model.generation_config.eos_token_id = eos
    assert tokens(attach(model), UNEQUAL, **options) == expected


def test_a_length_that_counts_the_prompt_is_refused_with_the_one_that_does_not(attach):
    """It was left aside without a word: max_new_tokens is always given."""
    with pytest.raises(UserError, match=r"^max_length counts the prompt and its padding; give max_new_tokens=N"):
        attach(model_of("llama")).generate(PROMPTS, 10, max_length=4)


def test_stop_strings_end_a_row(attach):
    model = model_of("llama")
    session, tokenizer = attach(model), tiny_tokenizer()
    free = tokens(session, PROMPTS[:1])[0]
    stop = tokenizer.decode([free[4]])
    expected = transformers_tokens(model, PROMPTS[:1], stop_strings=[stop], tokenizer=tokenizer)
    assert len(expected[0]) < 10
    assert tokens(session, PROMPTS[:1], stop_strings=[stop]) == expected


def test_text_is_the_new_tokens_only(attach):
    session = attach(model_of("llama"))
    out = session.generate("the cat sat", 5)
    assert out.text == tiny_tokenizer().decode(out.token_ids, skip_special_tokens=True)
    assert out.prompt == "the cat sat"
    assert len(out.token_ids) == 5


def test_exactly_max_new_tokens_are_made_up_to_the_end_of_the_context(attach):
    session = attach(model_of("llama"))
    assert len(session.generate(PROMPTS[0], 1).token_ids) == 1
    assert len(session.generate(prompt_ids(120), 8).token_ids) == 8
    with pytest.raises(UserError, match="120 tokens, 119 fit"):
        session.generate(prompt_ids(120), 9)


# sampling -----------------------------------------------------------------------------------------------------------


def test_sampling_follows_the_models_distribution_at_the_temperature():
    """2,000 rows with a seed each draw one token: frequencies within four standard errors of softmax(z / T)."""
    engine, n, temperature = engine_of("llama"), 2000, 1.5
    events = []
    spec = RunSpec(prompts=(tuple(PROMPTS[0]),) * n, generation=GenerationSpec(1, temperature, seeds=tuple(range(n))))
    engine.run(spec, events.append, Control())
    (sampled,) = [event.token_ids for event in events if isinstance(event, TokensSampled)]
    with torch.no_grad():
        logits = engine.runner.model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    expected = (logits / temperature).softmax(-1).numpy()
    frequency = np.bincount(sampled, minlength=VOCAB_SIZE) / n
    allowed = 4 * np.sqrt(expected * (1 - expected) / n) + 1 / n
    assert (np.abs(frequency - expected) <= allowed).all()
    assert (expected > 0.02).sum() >= 5


def test_the_same_seed_gives_the_same_text_and_another_seed_another(attach):
    session = attach(model_of("llama"))
    one, again, other = (session.generate(PROMPTS[0], 12, temperature=3.0, seed=seed) for seed in (7, 7, 8))
    assert one.token_ids == again.token_ids != other.token_ids


def test_without_a_seed_two_runs_differ(attach):
    session = attach(model_of("llama"))
    texts = {session.generate(PROMPTS[0], 12, temperature=3.0).token_ids for _ in range(4)}
    assert len(texts) > 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_rows_sampled_text_does_not_depend_on_its_batch(attach, family):
    session = attach(model_of(family))
    options = {"temperature": 2.0, "seed": 3}
    batch = tokens(session, PROMPTS, **options)
    assert batch == [tokens(session, [prompt], **options)[0] for prompt in PROMPTS]
    assert tokens(session, [PROMPTS[2], PROMPTS[0]], **options) == [batch[2], batch[0]]


def test_a_rows_sampled_text_does_not_depend_on_a_row_that_ended(attach):
    model = model_of("llama")
    session = attach(model)
    options = {"temperature": 2.0, "seed": 3}
    free = tokens(session, PROMPTS, **options)
    eos = next(token for token in free[1] if token not in free[0] + free[2])
    ended = tokens(session, PROMPTS, eos_token_id=eos, **options)
    assert ended[1] == free[1][: free[1].index(eos) + 1] != free[1]
    assert [ended[0], ended[2]] == [free[0], free[2]]


def test_seeds_belong_to_rows_and_the_global_generator_is_left_alone(attach):
    session = attach(model_of("llama"))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    session.generate(PROMPTS, 4, temperature=2.0, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_top_k_of_one_is_greedy(attach):
    session = attach(model_of("llama"))
    greedy = tokens(session, PROMPTS)
    assert tokens(session, PROMPTS, temperature=5.0, seed=1, top_k=1) == greedy
    assert tokens(session, PROMPTS, temperature=5.0, seed=1) != greedy


@pytest.mark.parametrize(
    "default",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"do_sample": True, "temperature": 0.01},
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "top_p": 0.01},
        {"do_sample": True, "min_p": 0.9},
        {"do_sample": True, "typical_p": 0.01},
        {"num_beams": 4},
        {"num_beams": 2, "num_return_sequences": 2},
        {"max_length": 12},
        {"max_new_tokens": 2},
        {"min_new_tokens": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_what_a_checkpoint_recommends_does_not_leak_into_a_run(attach, default, temperature):
    plain, recommended = model_of("llama"), model_of("llama")
    eos = transformers_tokens(plain, PROMPTS)[0][4]
    plain.generation_config.eos_token_id = recommended.generation_config.eos_token_id = eos
    for name, value in default.items():
        setattr(recommended.generation_config, name, value)
    options = {"temperature": temperature, "seed": 2}
    expected = tokens(attach(plain), PROMPTS, **options)
    assert tokens(attach(recommended), PROMPTS, **options) == expected
    assert {name: getattr(recommended.generation_config, name) for name in default} == default


class Records(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_run_warns_of_nothing_that_the_user_did_not_do(attach, temperature):
    """Python warnings are errors here; transformers warns through its logger."""
    model = model_of("llama")
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
    session, records = attach(model), Records()
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(records)
    try:
        session.generate(PROMPTS, 3, temperature=temperature, seed=1)
        session.generate(PROMPTS[0], 3, temperature=temperature, seed=1, lens=True)
        session.lens(PROMPTS[0], generate=3, temperature=temperature)
    finally:
        transformers_logger.removeHandler(records)
    assert records.messages == []


# refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "beam"),
        ({"num_return_sequences": 2, "temperature": 1.0}, "num_return_sequences"),
        ({"use_cache": False}, "use_cache"),
        ({"guidance_scale": 1.5}, "guidance_scale"),  # would run the model, and so the hooks, a second time per token
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),  # other ways of decoding, which the loop does not do
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"top_q": 0.5}, "'top_q' is unknown"),
        ({"repetition_penalti": 1.1, "top_p": 0.5}, "'repetition_penalti' is unknown"),
        ({"temperature": 1.0, "top_p": -0.5}, "top_p.*-0.5"),
        ({"repetition_penalty": -1.0}, "penalty.*-1.0"),
        ({"temperature": -1}, "temperature must be 0 .greedy. or a positive number, got -1"),
        ({"temperature": float("nan")}, "temperature .*nan"),
        ({"temperature": float("inf")}, "temperature .*inf"),
        ({"temperature": "hot"}, "temperature .*hot"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"max_new_tokens": -3}, "got -3"),
        ({"max_new_tokens": 2.5}, "got 2.5"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_in_one_line_by_name_and_the_session_goes_on(attach, options, message):
    session = attach(model_of("llama"))
    hooks = hook_count(session.model)
    with pytest.raises(UserError, match=message) as caught:
        session.generate(PROMPTS[0], **({"max_new_tokens": 4} | options))
    assert "\n" not in str(caught.value)
    assert hook_count(session.model) == hooks
    assert len(session.generate(PROMPTS[0], 2).token_ids) == 2


def test_beam_search_is_refused_with_the_reason(attach):
    with pytest.raises(UserError, match="beams reorder the rows that lens and steering follow"):
        attach(model_of("llama")).generate(PROMPTS[0], 4, num_beams=2)
    assert len(attach(model_of("llama")).generate(PROMPTS[0], 4, num_beams=1).token_ids) == 4
