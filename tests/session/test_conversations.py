"""Prompts that are conversations: what is fed, where each turn stands, and what is written and read there."""

import re
from copy import deepcopy

import numpy as np
import pytest
import torch
from every_tokenizer import byte_fallback, byte_level, unigram
from sessions import V, assert_close, plain, vector_of
from steered_runs import PlainWrite, endless_model, plain_pass
from tiny_models import tiny_tokenizer

import nblens
from nblens import Sample, Steer, UserError

CHATML = (
    "{% if messages[0].role != 'system' %}[system]be brief[end]{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]{% endfor %}"
    "{% if tools %}[{{ tools | length }} tools]{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% if thinking is false %}(none){% endif %}{% endif %}"
)
ASKED = [
    {"role": "system", "content": "a cat"},
    {"role": "user", "content": "  the cat sat  "},
    {"role": "assistant", "content": "on the mat"},
    {"role": "user", "content": "the cat"},
]
TEXT = "[system]a cat[end][user]the cat sat[end][assistant]on the mat[end][user]the cat[end][assistant]"


@pytest.fixture
def tokenizer():
    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def session(attach, tokenizer):
    session = attach(endless_model("llama"), tokenizer)
    session.vectors["v"] = vector_of()
    return session


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def positions_of(tokenizer, text, *pieces):
    """Tokens that hold a character of some pieces of a text; a piece is found by what follows it, after `|`."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    held = set()
    for piece in pieces:
        content, _, after = piece.partition("|")
        first = text.index(content + after)
        stop = first + len(content)
        held |= {place for place, (begin, end) in enumerate(offsets) if begin < stop and end > first}
    return sorted(held)


def fed(session, prompt, **options):
    return session.lens(prompt, layers=-1, **options).token_ids.tolist()


def test_messages_are_fed_as_the_template_writes_them(session, tokenizer):
    assert fed(session, ASKED) == ids_of(tokenizer, TEXT)
    assert fed(session, ASKED, chat=True) == ids_of(tokenizer, TEXT)
    assert fed(session, tuple(ASKED)) == ids_of(tokenizer, TEXT)
    one = [{"role": "user", "content": "the cat"}]
    assert fed(session, one) == fed(session, "the cat", chat=True)
    assert fed(session, one) == ids_of(tokenizer, "[system]be brief[end][user]the cat[end][assistant]")


def test_a_conversation_that_ends_with_the_assistant_is_gone_on_with(session, tokenizer):
    begun = TEXT.removesuffix("[end][user]the cat[end][assistant]")
    assert fed(session, ASKED[:3]) == ids_of(tokenizer, begun)
    closed = {"continue_final_message": False}
    assert fed(session, ASKED[:3], chat=closed) == ids_of(tokenizer, f"{begun}[end]")
    assert fed(session, ASKED[:2], chat={"add_generation_prompt": False})[-1:] == ids_of(tokenizer, "[end]")[-1:]


def test_options_reach_the_template_and_others_are_refused_with_the_nearest(session, tokenizer):
    assert fed(session, ASKED, chat={"thinking": False}) == ids_of(tokenizer, f"{TEXT}(none)")
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    assert fed(session, ASKED, chat={"tools": [tool]}) == ids_of(
        tokenizer, TEXT.removesuffix("[assistant]") + "[1 tools][assistant]"
    )
    with pytest.raises(UserError, match=r"does not read 'thinkin'; did you mean 'thinking'\?"):
        session.lens(ASKED, chat={"thinkin": False})
    with pytest.raises(UserError, match="chat is True, False or options of the chat template by name, got 'yes'"):
        session.lens("the cat", chat="yes")


def test_conversations_make_a_batch_and_what_is_read_equals_each_alone(session):
    batch = session.lens([ASKED, "the cat sat", ASKED[:2]])
    for one, prompt in zip(batch, [ASKED, "the cat sat", ASKED[:2]], strict=True):
        alone = session.lens(prompt)
        assert one.tokens == alone.tokens
        assert np.abs(one.top_logprobs - alone.top_logprobs).max() < 1e-4


def test_generation_attribution_capture_comparison_and_sweep_take_conversations(session, tokenizer):
    ids = ids_of(tokenizer, TEXT)
    assert session.generate(ASKED, 4).token_ids == session.generate(ids, 4).token_ids
    assert torch.equal(session.capture(ASKED), session.capture(ids))
    assert session.attribute(ASKED, [5]).logits.shape == (len(ids), 1)
    assert session.compare(ASKED, steer={"v": 1.0}).base.token_ids.tolist() == ids
    swept = session.sweep(ASKED, "v", [0, 1], 3, answers=("a", "the"))
    first, second = (ids_of(tokenizer, answer) for answer in (" a", " the"))
    assert swept.answers == (" a", " the")
    assert len(first) == len(second) == 1
    expected = plain(session, ids, len(ids), PlainWrite(1, V, 1.0)).log_probs[-1]
    assert swept.propensities[1] == pytest.approx(float(expected[first[0]] - expected[second[0]]), abs=1e-4)


LAST = "the cat|[end][assistant]"  # these words stand in the first turn, too
WRITTEN = {
    "system": ["a cat"],
    "user": ["the cat sat", LAST],
    "assistant": ["on the mat"],
    "turn:0": ["a cat"],
    "turn:2": ["on the mat"],
    "turn:-1": [LAST],
}


@pytest.mark.parametrize(("op", "strength"), [("add", 1.5), ("ablate", 1.0)])
@pytest.mark.parametrize("write", WRITTEN)
def test_a_vector_is_written_at_the_content_of_messages(session, tokenizer, write, op, strength):
    ids, held = ids_of(tokenizer, TEXT), positions_of(tokenizer, TEXT, *WRITTEN[write])
    strengths = [strength if place in held else 0.0 for place in range(len(ids))]
    acts = session.capture(ASKED, steer=[Steer("v", strength, write=write, op=op)])
    assert_close(acts, plain(session, ids, len(ids), PlainWrite(1, V, strengths, op=op)).sites["resid_post"])


def test_what_is_generated_is_the_assistants_and_rows_have_turns_of_their_own(session, tokenizer):
    steer = [Steer("v", 2.0, write="assistant")]
    prompts = [ASKED, ASKED[:2], ASKED[:3]]
    for prompt, acts, out in zip(
        prompts,
        session.capture(prompts, generate=4, steer=steer),
        session.generate(prompts, 4, steer=steer),
        strict=True,
    ):
        ids = fed(session, prompt)
        whole = [*ids, *out.token_ids[:-1]]
        text = tokenizer.decode(ids)
        held = positions_of(tokenizer, text, "on the mat") if len(prompt) > 2 else []
        strengths = [2.0 if place in held or place >= len(ids) else 0.0 for place in range(len(whole))]
        assert_close(acts, plain(session, whole, len(ids), PlainWrite(1, V, strengths)).sites["resid_post"])


def test_a_role_that_is_not_there_is_one_line(session):
    with pytest.raises(UserError, match="'v' is written at 'tool', and the prompt has no such message; its messages"):
        session.lens(ASKED, steer=[Steer("v", 1.0, write="tool")])
    with pytest.raises(UserError, match="'v' is written at 'user', and the prompt .*it is no conversation"):
        session.lens("the cat sat", steer=[Steer("v", 1.0, write="user")])
    with pytest.raises(UserError, match="'v' is written at 'turn:7', and the prompt has no such message"):
        session.lens(ASKED, steer=[Steer("v", 1.0, write="turn:7")])
    with pytest.raises(UserError, match="pair 1: read position 'tool': a text has no such message; .* user"):
        session.extract("w", [([ASKED[3]], [ASKED[1]])], read="tool")
    session.vectors["x"] = vector_of(write="user")
    session.steer({"x": 1.0})
    plain_text = session.lens("the cat sat")  # a live setting that means turns leaves plain text alone
    session.steer.off()
    assert np.array_equal(plain_text.top_logprobs, session.lens("the cat sat").top_logprobs)


@pytest.mark.parametrize(
    ("read", "pieces"), [("user", [LAST]), ("assistant", ["on the mat"]), ("turn:0", ["a cat"]), ("turn:-1", [LAST])]
)
def test_a_vector_is_read_at_the_last_message_of_a_role(session, tokenizer, read, pieces):
    other = [{**message, "content": "a man had tea"} for message in ASKED]
    vector = session.extract("w", [(ASKED, other)], read=read, layers=[1], progress=False)
    texts = [TEXT, TEXT]
    for part in ("a cat", "the cat sat", "on the mat", "the cat"):
        texts[1] = texts[1].replace(f"]{part}[", "]a man had tea[")
    expected = []
    for text, own in zip(texts, (pieces, None), strict=True):
        ids = ids_of(tokenizer, text)
        if own is None:
            number = {"user": 3, "assistant": 2, "turn:0": 0, "turn:-1": 3}[read]
            first = [match.start() for match in re.finditer("a man had tea", text)][number]
            offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            held = [p for p, (a, b) in enumerate(offsets) if a < first + len("a man had tea") and b > first]
        else:
            held = positions_of(tokenizer, text, *own)
        expected.append(plain_pass(session.model, "llama", ids, len(ids)).sites["resid_post"][1, held].mean(0))
    np.testing.assert_allclose(vector.directions[1], (expected[0] - expected[1]).numpy(), atol=1e-4)
    assert vector.read == read


def test_samples_may_ask_in_a_conversation_and_are_written_by_role(session, tokenizer, tmp_path):
    samples = [Sample(ASKED, "a", "the"), Sample(ASKED[:2], "the", "a")]
    session.vectors["v"] = vector_of(write="user")
    report = session.steerability("v", samples, [0, 1], controls=False, neutral=[], progress=False)
    for sample, values in zip(samples, report.dose_response.values, strict=True):
        ids = fed(session, sample.prompt)
        text = TEXT if len(sample.prompt) == 4 else "[system]a cat[end][user]the cat sat[end][assistant]"
        held = positions_of(tokenizer, text, *(["the cat sat", LAST] if len(sample.prompt) == 4 else ["the cat sat"]))
        strengths = [1.0 if place in held else 0.0 for place in range(len(ids))]
        expected = plain(session, ids, len(ids), PlainWrite(1, V, strengths)).log_probs[-1]
        one, other = (ids_of(tokenizer, f" {answer}")[0] for answer in (sample.positive, sample.negative))
        assert values[1] == pytest.approx(float(expected[one] - expected[other]), abs=1e-4)
    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": [{"role": "user", "content": "the cat"}], "positive": "a", "negative": "the"}\n')
    assert session.steerability("v", path, [0, 1], controls=False, neutral=[], progress=False).n_samples == 1


@pytest.mark.parametrize("kind", [byte_level, byte_fallback, unigram])
@pytest.mark.parametrize("brings", [True, False])
def test_a_beginning_stands_once_whether_the_template_brings_it_or_not(attach, kind, brings):
    tokenizer = kind("bos")
    begins = "{{ bos_token }}" if brings else ""
    tokenizer.chat_template = begins + "{% for m in messages %}{{ m.content }} {% endfor %}"
    session = attach(endless_model("llama", vocab_size=len(tokenizer)), tokenizer)
    ids = fed(session, [{"role": "user", "content": "the cat"}])
    assert ids.count(tokenizer.bos_token_id) == int(brings)


def test_messages_without_a_template_or_a_role_are_one_line(session):
    session.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template; leave chat out, and give text"):
        session.lens(ASKED)
    with pytest.raises(UserError, match="a message is .*got {'content': 'hello'}"):
        session.lens([{"content": "hello"}])


def test_a_template_that_trims_and_one_that_drops_a_message_give_no_wrong_place(session):
    session.tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last %}{{ m.content | upper }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="'v' is written at 'turn:0', and the prompt has no such message"):
        session.lens(ASKED, steer=[Steer("v", 1.0, write="turn:0")])
    traj = session.lens(ASKED, steer=[Steer("v", 1.0, write="turn:3")])
    assert isinstance(traj, nblens.Trajectory)
