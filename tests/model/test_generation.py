"""The stepping loop: what is fed, at which positions, how often, and what an observer is told."""

from functools import cache
from math import ceil

import pytest
import torch
from tiny_models import FAMILIES, N_BLOCKS, VOCAB_SIZE, prompt_ids, tiny_model
from transformers import DynamicCache

from nblens.errors import UserError
from nblens.model.generation import Batch, SteppingLoop, generate_text
from nblens.specs import GenerationSpec, LensSpec, RunSpec

PROMPTS = [prompt_ids(length, seed=length) for length in (5, 9, 2)]
WIDTH = 9
POSITIONS = [
    [-1, -1, -1, -1, 0, 1, 2, 3, 4],
    [0, 1, 2, 3, 4, 5, 6, 7, 8],
    [-1, -1, -1, -1, -1, -1, -1, 0, 1],
]
LENS = LensSpec(blocks=tuple(range(N_BLOCKS)), top_k=3)
NEVER = VOCAB_SIZE  # an end-of-text id that no model says
PAD = 2


@cache
def model_of(family):
    return tiny_model(family)


class Recorder:
    """An observer that keeps what it is told, and stops the run before step `stop_at`."""

    def __init__(self, stop_at=None):
        self.begun, self.steps, self.sampled = [], [], []
        self._stop_at = stop_at

    def before(self, phase, columns, batch):
        if len(self.begun) == self._stop_at:
            return False
        self.begun.append((phase, columns.start, columns.stop))
        return True

    def after(self, step, sampled):
        self.steps.append(step)
        self.sampled.append(sampled)


def batch_of(prompts=PROMPTS):
    return Batch.of(prompts, PAD, torch.device("cpu"))


def generated(model, spec, *, prompts=PROMPTS, width=4, stop_at=None):
    """The ids that `generate_text` returns, and what an observer saw."""
    batch, seen = batch_of(prompts), Recorder(stop_at)
    ids = generate_text(model, batch, SteppingLoop(model, batch, seen, width=width), spec, PAD)
    return ids.tolist(), seen


def greedy(n, **options):
    return GenerationSpec(n, options={"eos_token_id": NEVER, **options})


@torch.no_grad()
def greedy_by_hand(model, prompt, n):
    """Greedy continuation by full passes without a cache."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids


def test_a_batch_is_padded_on_the_left():
    batch = Batch.of([[7], [8, 9, 10]], PAD, torch.device("cpu"))
    assert batch.input_ids.tolist() == [[PAD, PAD, 7], [8, 9, 10]]
    assert batch.mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert batch.lengths == (1, 3)
    assert (batch.rows, batch.width) == (2, 3)


@pytest.mark.parametrize("width", [1, 4, 9, 50])
def test_prefill_tells_what_was_fed_and_what_follows(width):
    seen = Recorder()
    model = model_of("llama")
    assert SteppingLoop(model, batch_of(), seen, width=width).prefill(DynamicCache(config=model.config))
    bounds = [(start, min(start + width, WIDTH)) for start in range(0, WIDTH, width)]
    assert seen.begun == [("prompt", *bound) for bound in bounds]
    assert [(s.phase, s.start, s.start + s.width) for s in seen.steps] == seen.begun
    assert torch.cat([s.positions for s in seen.steps], 1).tolist() == POSITIONS
    following = torch.cat([s.next_ids for s in seen.steps], 1)
    for row, prompt in enumerate(PROMPTS):
        assert following[row, -len(prompt) :].tolist() == [*prompt[1:], -1]
    assert seen.sampled == [None] * len(bounds)


def test_decoding_tells_positions_and_tokens_of_rows_that_are_alive():
    model = model_of("llama")
    free, _ = generated(model, GenerationSpec(6, 3.0, seeds=(0, 1, 2), options={"eos_token_id": NEVER}))
    new = [row[WIDTH:] for row in free]
    eos = new[1][2]
    assert eos not in new[1][:2] + new[0] + new[2]
    ids, seen = generated(model, GenerationSpec(6, 3.0, seeds=(0, 1, 2), options={"eos_token_id": eos}))
    assert [row[WIDTH:] for row in ids] == [new[0], [*new[1][:3], PAD, PAD, PAD], new[2]]
    assert seen.begun == [("prompt", 0, 4), ("prompt", 4, 8), ("prompt", 8, 9)] + [
        ("generated", column, column + 1) for column in range(9, 14)
    ]
    assert torch.cat([s.positions for s in seen.steps], 1).tolist() == [
        [*POSITIONS[0], 5, 6, 7, 8, 9],
        [*POSITIONS[1], 9, 10, -1, -1, -1],  # its end-of-text is never fed, nor anything after it
        [*POSITIONS[2], 2, 3, 4, 5, 6],
    ]
    following = torch.cat([s.next_ids for s in seen.steps], 1)
    assert following[0, 4:].tolist() == [*PROMPTS[0][1:], *new[0]]
    assert following[1].tolist() == [*PROMPTS[1][1:], *new[1][:3], -1, -1, -1]
    assert seen.sampled[:2] == [None, None]
    assert seen.sampled[2:] == [[new[0][i], new[1][i] if i < 3 else None, new[2][i]] for i in range(6)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_of_a_padded_chunked_batch_is_that_of_uncached_passes(family):
    ids, _ = generated(model_of(family), greedy(5))
    for prompt, row in zip(PROMPTS, ids, strict=True):
        assert row[WIDTH - len(prompt) :] == greedy_by_hand(model_of(family), prompt, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_given_absolute_positions(family):
    model, fed, masks = model_of(family), [], []

    def record(module, args, kwargs):
        fed.append(kwargs["position_ids"])
        masks.append(kwargs["attention_mask"])

    with model.register_forward_pre_hook(record, with_kwargs=True):
        generated(model, greedy(4))
    assert [p.shape[1] for p in fed] == [4, 4, 1, 1, 1, 1]
    assert torch.cat(fed, 1).tolist() == [
        [*(max(p, 0) for p in row), length, length + 1, length + 2]
        for row, length in zip(POSITIONS, (5, 9, 2), strict=True)
    ]
    assert [m.shape[1] for m in masks] == [4, 8, 9, 10, 11, 12]
    assert masks[-1].tolist() == [[*(int(p >= 0) for p in row), 1, 1, 1] for row in POSITIONS]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon", "opt"])
def test_lens_and_generation_feed_every_token_once(attach, run_spec, family):
    session = attach(model_of(family))
    shapes = {block: [] for block in range(N_BLOCKS)}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, block=block: shapes[block].append(
                (args[0] if args else kwargs["hidden_states"]).shape[:2]
            ),
            with_kwargs=True,
        )
        for block, module in enumerate(session.architecture.blocks)
    ]
    prompts = (tuple(prompt_ids(10)), tuple(prompt_ids(10, seed=1)))
    spec = RunSpec(prompts, lens=LENS, generation=greedy(7), chunk=8)
    run_spec(session, spec)
    for handle in handles:
        handle.remove()
    n_steps = ceil(10 / 4) + 7 - 1
    for block in range(N_BLOCKS):
        assert len(shapes[block]) == n_steps
        assert sum(rows * columns for rows, columns in shapes[block]) == 2 * (10 + 7 - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_never_projects_a_prompt_to_logits(attach, run_spec, monkeypatch, family):
    session = attach(model_of(family))
    projected, lm_head = [], session.architecture.lm_head
    project = lm_head.forward

    def counting(hidden):
        projected.append(hidden[..., 0].numel())
        return project(hidden)

    monkeypatch.setattr(lm_head, "forward", counting)
    lens = RunSpec((tuple(prompt_ids(10)), tuple(prompt_ids(7))), lens=LENS, chunk=8)
    run_spec(session, lens)
    assert sum(projected) == 0
    projected.clear()
    run_spec(session, RunSpec(lens.prompts, lens=LENS, generation=greedy(4), chunk=8))
    assert [n for n in projected if n] == [2, 2, 2, 2]  # one row of each, at the four steps that were sampled from


def test_an_observer_stops_prefill_and_decoding_before_a_step():
    model, seen = model_of("llama"), Recorder(stop_at=2)
    assert not SteppingLoop(model, batch_of(), seen, width=4).prefill(DynamicCache(config=model.config))
    assert [step.start for step in seen.steps] == [0, 4]
    ids, seen = generated(model, greedy(6), stop_at=1)
    assert [len(row) for row in ids] == [WIDTH] * 3
    assert len(seen.steps) == 1
    ids, seen = generated(model, greedy(6), stop_at=5)
    assert [len(row) for row in ids] == [WIDTH + 3] * 3
    assert len(seen.steps) == 5


def test_a_rows_sampled_text_does_not_depend_on_the_rows_beside_it():
    model = model_of("llama")
    together, _ = generated(model, GenerationSpec(8, 1.0, seeds=(3, 4, 5), options={"eos_token_id": NEVER}))
    for row, (prompt, seed) in enumerate(zip(PROMPTS, (3, 4, 5), strict=True)):
        spec = GenerationSpec(8, 1.0, seeds=(seed,), options={"eos_token_id": NEVER})
        (alone,), _ = generated(model, spec, prompts=[prompt])
        assert together[row][WIDTH:] == alone[len(prompt) :]
    again, _ = generated(model, GenerationSpec(8, 1.0, seeds=(4, 4, 5), options={"eos_token_id": NEVER}))
    assert again[0] != together[0]
    assert again[1:] == together[1:]


def test_sampling_leaves_the_callers_random_state_alone():
    model = model_of("llama")
    before = torch.get_rng_state()
    generated(model, GenerationSpec(4, 1.0, seeds=(1, 2, 3)))
    assert torch.equal(torch.get_rng_state(), before)


def test_tokens_are_drawn_in_proportion_to_the_models_probabilities():
    model, temperature, n = model_of("cohere"), 0.5, 2000
    prompt = prompt_ids(4)
    with torch.no_grad():
        expected = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    spec = GenerationSpec(1, temperature, seeds=tuple(range(n)), options={"eos_token_id": NEVER})
    ids, _ = generated(model, spec, prompts=[prompt] * n)
    counts = torch.bincount(torch.tensor(ids)[:, -1], minlength=VOCAB_SIZE)
    deviation = (counts - n * expected) / (n * expected * (1 - expected)).sqrt()
    assert deviation[expected > 5e-3].abs().max() < 4.5
    assert counts[expected <= 5e-3].sum() / n == pytest.approx(expected[expected <= 5e-3].sum().item(), abs=0.06)


def test_options_are_transformers_own():
    model = model_of("llama")
    ((*_, first), *_), _ = generated(model, greedy(1))
    ids, _ = generated(model, greedy(3, suppress_tokens=[first]))
    assert first not in ids[0][WIDTH:]
    ids, _ = generated(model, GenerationSpec(3, options={"eos_token_id": first, "min_new_tokens": 3}))
    assert first not in ids[0][WIDTH : WIDTH + 2]


def test_generation_stops_behind_a_string(attach):
    session = attach(model_of("llama"))
    free = session.generate(PROMPTS[0], 12, eos_token_id=NEVER)
    stop = session.tokenizer.decode(free.token_ids[3])
    stopped = session.generate(PROMPTS[0], 12, eos_token_id=NEVER, stop_strings=[stop])
    assert stopped.token_ids == free.token_ids[:4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, "beam search is not supported"),
        ({"top_pp": 0.9}, "'top_pp' is unknown"),
        ({"top_k": -1}, "top_k"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"use_cache": False}, "use_cache"),
    ],
)
def test_an_option_that_cannot_be_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        generated(model_of("llama"), GenerationSpec(2, 1.0, seeds=(0, 1, 2), options=options))


@pytest.mark.parametrize(
    "recommended", [{"repetition_penalty": 50.0}, {"num_beams": 3}, {"min_p": 0.99}, {"use_cache": False}], ids=str
)
def test_what_a_checkpoint_recommends_for_generation_changes_nothing(recommended):
    sampled = GenerationSpec(12, 1.0, seeds=(0, 1, 2), options={"eos_token_id": NEVER})
    expected = [generated(tiny_model("opt"), spec)[0] for spec in (greedy(12), sampled)]
    model = tiny_model("opt")
    for name, value in recommended.items():
        setattr(model.generation_config, name, value)
    assert [generated(model, spec)[0] for spec in (greedy(12), sampled)] == expected
