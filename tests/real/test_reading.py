"""What the lens reads of a real model, against plain transformers and torch."""

import numpy as np
import pytest
import torch

from nblens import UserError

TOLERANCE = 1e-4
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@torch.no_grad()
def dense(model, ids, positions):
    """Log-probabilities at some positions of every block, float64, (30, positions, V): hooks, norm and lm_head."""
    states, handles = [], []
    for block in model.model.layers:
        keep = lambda module, args, output: states.append((output[0] if isinstance(output, tuple) else output)[0])  # noqa: E731
        handles.append(block.register_forward_hook(keep))
    model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    weight, head = model.model.norm.weight.double(), model.lm_head.weight.double()
    for state in states:
        x = state[positions].double()
        x = x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt() * weight
        yield (x @ head.T).log_softmax(-1)


def assert_reads(trajectory, model, ids, positions):
    blocks = list(dense(model, ids, positions))
    final = blocks[-1]
    assert list(trajectory.layers) == list(range(30))
    for block, logprobs in enumerate(blocks):
        values, top = logprobs.topk(trajectory.top_ids.shape[-1])
        ours = torch.from_numpy(trajectory.top_ids[block][positions]).long()
        np.testing.assert_allclose(trajectory.top_logprobs[block][positions], values, atol=TOLERANCE)
        np.testing.assert_allclose(logprobs.gather(1, ours), values, atol=TOLERANCE)
        assert (ours[:, 0] == top[:, 0]).float().mean() > 0.99  # but for ties
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        np.testing.assert_allclose(trajectory.entropy[block][positions], entropy, atol=TOLERANCE)
        kl = (logprobs.exp() * (logprobs - final)).sum(-1)
        np.testing.assert_allclose(trajectory.kl_to_final[block][positions], kl, atol=TOLERANCE)
        for place, position in enumerate(positions):
            if position + 1 < len(ids):
                own = logprobs[place, ids[position + 1]]
                assert abs(trajectory.next_logprob[block, position] - own) <= TOLERANCE
                above = [int((logprobs[place] > own + shift).sum()) for shift in (1e-5, -1e-5)]
                assert above[0] <= trajectory.next_rank[block, position] - FIRST <= above[1]


FIRST = 1
"""the rank of the likeliest token"""


@pytest.mark.parametrize("n_tokens", [1, 40, 600])
def test_every_block_says_what_transformers_and_torch_say(real, model, paragraph, n_tokens):
    ids = real.tokenizer(paragraph)["input_ids"][:n_tokens]
    assert len(ids) == n_tokens
    positions = list(range(n_tokens)) if n_tokens <= 40 else [*range(0, n_tokens, 40), n_tokens - 1]
    assert_reads(real.lens(ids, top_k=5), model, ids, positions)


def test_padded_rows_read_as_they_do_alone(real, model):
    prompts = ["The capital of France is", "Hello", "In 1969 the first people landed on the"]
    for trajectory, prompt in zip(real.lens(prompts, top_k=5), prompts, strict=True):
        ids = real.tokenizer(prompt)["input_ids"]
        assert trajectory.token_ids.tolist() == ids
        assert_reads(trajectory, model, ids, list(range(len(ids))))


def test_a_chat_is_fed_as_the_template_writes_it(real, model):
    ids = real.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    trajectory = real.lens(CHAT[0]["content"], chat=True, top_k=5)
    assert trajectory.token_ids.tolist() == list(ids)
    assert_reads(trajectory, model, list(ids), list(range(len(ids))))


def test_the_answer_appears_at_the_last_blocks(real, model):
    prompt = "The capital of France is"
    trajectory = real.lens(prompt, targets=["Paris"])
    (paris,) = real.tokenizer(" Paris")["input_ids"]
    assert trajectory.target_ids.tolist() == [paris]
    (curve,) = np.exp(trajectory.target_logprobs[:, -1].T)
    assert curve[-1] == pytest.approx(0.77, abs=0.01)
    with torch.no_grad():
        plain = model(**real.tokenizer(prompt, return_tensors="pt")).logits[0, -1].softmax(-1)
    assert curve[-1] == pytest.approx(float(plain[paris]), abs=TOLERANCE)
    assert curve[:20].max() < 0.05
    assert "following ·Paris" in repr(trajectory)


def test_in_a_chat_the_answer_begins_behind_the_templates_new_line(real, model):
    (bare,) = real.tokenizer("Paris")["input_ids"]
    ids = list(real.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"])
    assert real.lens(CHAT, layers=-1, targets=["Paris"]).target_ids.tolist() == [bare]
    assert real.lens(ids, layers=-1, targets=["Paris"]).target_ids.tolist() == [bare]
    with pytest.raises(
        UserError, match=r"target 'Paris' is ' Paris' \(id \d+\) after prompt 1 and 'Paris' .* prompt 2"
    ):
        real.lens(["The capital of France is", ids], layers=-1, targets=["Paris"])


def test_greedy_text_is_that_of_transformers(real, model):
    for chat in (False, True):
        prompt = CHAT[0]["content"]
        ids = real.tokenizer(prompt)["input_ids"]
        if chat:
            ids = real.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
        written = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
        out = real.generate(prompt, 24, chat=chat)
        assert list(out.token_ids[-len(written) :]) == written
        assert out.text == real.tokenizer.decode(written, skip_special_tokens=True)


def test_characters_of_several_tokens_are_never_another_letter(real):
    trajectory = real.lens("那", top_k=3)
    assert len(trajectory.token_ids) == 3
    assert trajectory.tokens == ("⟨E9⟩", "⟨82⟩", "⟨A3⟩")
    assert real.lens("那", targets=["⟨A3⟩"]).target_ids.tolist() == [int(trajectory.token_ids[-1])]
    assert trajectory.text == "那"
    assert trajectory.characters == ("那",) * 3
    assert 'title="⟨82⟩ of 那' in trajectory.to_html()
