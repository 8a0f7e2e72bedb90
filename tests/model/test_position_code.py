"""Where a model codes positions otherwise for long texts, single pass, chunks, steps and padded rows still agree."""

import logging
import warnings

import pytest
import torch
from family_outcomes import difference, lens_of_last_block, prompt
from shrunken_models import MODEL_CLASSES, randomise, shrunken_model
from tiny_models import prompt_ids, tiny_model
from torch import nn

from nblens.engine.engine import Engine
from nblens.engine.runner import Runner
from nblens.errors import UnsupportedModelError, UserError
from nblens.model.architecture import find_architecture
from nblens.model.batching import Batching
from nblens.model.find_batching import find_batching

pytestmark = pytest.mark.usefixtures("one_thread")

LONGEST = 12
CASES = {
    "both sides in small steps": ([19, LONGEST, LONGEST + 1, 9], 0, 5),
    "texts that go on beyond it": ([19, 16], 4, None),
    "texts that end at it": ([LONGEST - 3, 5], 4, None),
}
"""lengths of prompts, new tokens, tokens of a step"""


def longrope_model(family):
    """The family with one set of frequencies up to 12 tokens, and another beyond; None where it takes none."""
    try:
        plain = shrunken_model(family)
    except Exception:
        return None
    config = plain.config
    text = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or {}
    buffers = {name: buffer for name, buffer in plain.named_buffers() if name.endswith("inv_freq")}
    widths = {len(buffer) for name, buffer in buffers.items() if "vis" not in name and "audio" not in name}
    if not parameters or len(widths) != 1:
        return None
    if hasattr(text, "original_max_position_embeddings"):
        text.original_max_position_embeddings = LONGEST
    width = widths.pop()
    for one in [value for value in parameters.values() if isinstance(value, dict)] or [parameters]:
        one.update(
            rope_type="longrope",
            original_max_position_embeddings=LONGEST,
            factor=128 / LONGEST,
            short_factor=[1.0 + 0.1 * i for i in range(width)],
            long_factor=[2.0 + i for i in range(width)],
        )
    torch.manual_seed(0)
    try:
        model = type(plain)(config)
    except Exception:
        return None
    randomise(model)
    return model.eval()


def largest_differences(model, engine):
    """From plain passes over single rows, by case."""
    found = {}
    for case, (lengths, generate, chunk) in CASES.items():
        rows = [prompt(length, seed) for seed, length in enumerate(lengths)]
        trajectories = lens_of_last_block(engine, rows, generate, chunk)
        found[case] = max(
            difference(model, trajectory, len(ids) + max(0, generate - 1))
            for ids, trajectory in zip(rows, trajectories, strict=True)
        )
    return found


@pytest.mark.parametrize("letter", sorted({family[0] for family in MODEL_CLASSES}))
def test_texts_on_both_sides_of_longrope_equal_plain_passes_in_every_family(letter, monkeypatch):
    monkeypatch.setattr(logging.root.manager, "disable", logging.WARNING)
    for family in [family for family in MODEL_CLASSES if family.startswith(letter)]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if (model := longrope_model(family)) is None or not _codes_anew(model):
                continue
            try:
                engine = Engine(Runner.of(model, pad_id=2))
            except UnsupportedModelError:
                with pytest.raises(UnsupportedModelError):
                    Runner.of(shrunken_model(family), pad_id=2)
                continue
            assert (engine.runner.batching.longest, engine.runner.batching.varies) == (LONGEST, False), family
            assert not engine.runner.batching.leftovers
            found = largest_differences(model, engine)
        assert max(found.values()) < 5e-4, (family, found)  # frequencies of another length are off by 1e-2 and more


@torch.no_grad()
def _codes_anew(model):
    """Whether the family can be read at all, and its first token's logits change with the length of the text."""
    ids = torch.tensor([prompt(LONGEST + 1, 3)])
    try:
        find_architecture(model)
        long, short = (model(input_ids=part, use_cache=False).logits[0, 5] for part in (ids, ids[:, :-1]))
    except Exception:
        return False
    return (long - short).abs().max() > 1e-3


LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": LONGEST,
    },
    "original_max_position_embeddings": LONGEST,
}


def test_a_text_that_would_pass_the_length_is_refused_with_what_can_be_generated(attach):
    session = attach(tiny_model("phi3", **LONGROPE))
    with pytest.raises(
        UserError,
        match=r"^a text of 10 tokens with 5 new ones passes 12 tokens, beyond which this model codes all positions "
        r"anew; generate at most 3$",
    ):
        session.generate(prompt_ids(10), 5)
    assert len(session.generate(prompt_ids(10), 3).token_ids) == 3
    assert len(session.generate(prompt_ids(13), 5).token_ids) == 5


def test_vectors_scores_and_lenses_of_texts_on_both_sides_are_those_of_each_alone(attach):
    session = attach(tiny_model("phi3", **LONGROPE))
    prompts = [prompt_ids(20, 1), prompt_ids(12, 2), prompt_ids(13, 3), prompt_ids(4, 4)]
    for together, ids in zip(session.capture(prompts), prompts, strict=True):
        torch.testing.assert_close(together, session.capture(ids), rtol=0, atol=3e-4)
        with torch.no_grad():
            own = session.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(together[0], own[0], rtol=0, atol=3e-4)
    text = "the cat sat on the mat"
    for prompt_text in (text, f"{text} {text} {text}"):
        session.vectors["v"] = session.extract("v", [(text, "a dog"), (text * 4, "one day")], progress=False)
        scored = session.sweep(prompt_text, "v", (0.0, 1.0), 1, answers=(" and", " the"))
        sums = [_answer_logprob(session, prompt_text, answer) for answer in (" and", " the")]
        assert scored.propensities[0] == pytest.approx(sums[0] - sums[1], abs=1e-3)


@torch.no_grad()
def _answer_logprob(session, text, answer):
    """By a plain pass."""
    ids, start = session.tokenizer.encode(text + answer), len(session.tokenizer.encode(text))
    logprobs = session.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logprobs[at - 1, ids[at]].item() for at in range(start, len(ids)))


class Growing(nn.Module):
    """A rotary embedding with frequencies of its own for each length beyond 12, which it remembers, as dynamic NTK."""

    def __init__(self, rotary):
        super().__init__()
        self.rotary, self.longest = rotary, torch.tensor(LONGEST)

    def forward(self, x, position_ids):
        length = position_ids.max() + 1
        if length > self.longest:
            self.longest = length
        elif length < LONGEST:
            self.longest = torch.tensor(LONGEST)
        self.scale = 1 + 0.1 * (self.longest - LONGEST)
        return self.rotary(x, position_ids / self.scale)


class Leaf(Growing):
    """The same without parts."""

    def __init__(self, rotary):
        super().__init__(rotary)
        del self.rotary
        object.__setattr__(self, "rotary", rotary)


def test_where_each_length_has_its_own_code_texts_are_read_alone_and_do_not_grow(attach):
    model = tiny_model("llama")
    model.model.rotary_emb = Leaf(model.model.rotary_emb)
    session = attach(model)
    prompts = [prompt_ids(n, n) for n in (20, 15, 12, 20, 5)]
    for together, ids in zip(session.capture(prompts), prompts, strict=True):
        model.model.rotary_emb.longest = torch.tensor(LONGEST)
        with torch.no_grad():
            own = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(together[0], own[0], rtol=0, atol=3e-4)
    with pytest.raises(
        UserError, match=r"^beyond 12 tokens this model codes all positions anew at each length: a text of"
    ):
        session.generate(prompt_ids(20), 2)
    with pytest.raises(UserError, match=r"generate at most 8$"):
        session.generate(prompt_ids(5), 12)
    assert len(session.generate(prompt_ids(20), 1).token_ids) == 1
    assert len(session.generate(prompt_ids(5), 8).token_ids) == 8


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_other_rotary_embeddings_are_the_same_at_all_lengths_of_the_context(attach, rope):
    """Dynamic NTK begins where the context of its configuration ends, and prompts do, too."""
    model = tiny_model("llama", rope_parameters=rope)
    session = attach(model)
    assert find_batching(model, find_architecture(model)) == Batching()
    prompts = [prompt_ids(128, 1), prompt_ids(90, 2), prompt_ids(5, 3)]
    for together, ids in zip(session.capture(prompts), prompts, strict=True):
        with torch.no_grad():
            own = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(together[0], own[0], rtol=0, atol=3e-4)
    with pytest.raises(UserError, match="129 tokens, 128 fit"):
        session.lens(prompt_ids(129))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["phi3", "qwen3_moe", "gemma2"])
def test_the_length_is_found_in_half_precision(family, dtype):
    rope = dict(LONGROPE["rope_parameters"], factor=1.0)
    rope["long_factor"] = [1.0, 1.1, 1.2, 1.31]  # hardly another
    model = tiny_model(family, dtype=dtype, rope_parameters=rope)
    model.config.original_max_position_embeddings = LONGEST
    assert find_batching(model, find_architecture(model)).longest == LONGEST


@pytest.mark.parametrize("family", ["gpt2", "opt", "biogpt", "gptj", "codegen", "ctrl", "mpt", "whisper", "xglm"])
def test_a_text_beyond_the_table_of_positions_is_refused_with_its_length(attach, family):
    model = shrunken_model(family)
    session = attach(model)
    fits = list(prompt(128, 1))
    with torch.no_grad():
        own = model(input_ids=torch.tensor([fits]), use_cache=False).logits[0].log_softmax(-1)
    read = session.lens(fits, layers=-1, top_k=3)
    found = own.gather(-1, torch.from_numpy(read.top_ids[-1]).long())
    torch.testing.assert_close(torch.from_numpy(read.top_logprobs[-1]), found, rtol=0, atol=1e-3)
    with pytest.raises(UserError, match="129 tokens, 128 fit"):
        session.lens([*fits, 5])
    with pytest.raises(UserError, match="128 tokens, 127 fit"):
        session.generate(fits, 1)
