"""Mistakes that a user can make, with what each is told: for tests in this process and over several ranks."""

from itertools import count, repeat

import numpy as np
from steered_runs import direction, hook_count
from tiny_models import N_BLOCKS, VOCAB_SIZE, prompt_ids

import nblens
from nblens import Steer, SteeringVector
from nblens.backends.local import LocalBackend

TEXT = "the cat sat on the mat"
PAIRS = [("the cat sat", "a dog"), ("one day", "her house")]
LONG = prompt_ids(129)


def steered(session: nblens.Session) -> nblens.Session:
    """A session of a tiny model with a vector "v" for every block, which steers."""
    session.vectors["v"] = SteeringVector(
        "v", {block: direction(block) for block in range(N_BLOCKS)}, n_blocks=N_BLOCKS
    )
    session.steer({"v": 0.5})
    return session


def state(session):
    """What a mistake must not change."""
    here = isinstance(session.backend, LocalBackend)
    return (
        sorted(session.vectors),
        session.steer.setting,
        hook_count(session.model) if here else None,
        session.generate(TEXT, 3).token_ids,
        session.capture(TEXT).sum().item(),
    )


def assert_one_line(error):
    message = str(error)
    assert message
    assert "\n" not in message
    assert not message.endswith((":", ";"))
    assert len(message) < 300


MISTAKES = {
    # layers, sites, lens
    "layer beyond the last": (lambda s: s.lens(TEXT, layers=3), r"layer 3 is out of range; the model has blocks 0-2"),
    "layer before the first": (lambda s: s.lens(TEXT, layers=-4), r"layer -4 is out of range; .* 0-2"),
    "layer in a range": (lambda s: s.capture(TEXT, layers="0-7"), r"layer 7 is out of range; .* 0-2"),
    "layer for steering": (lambda s: s.steer([Steer("v", 1.0, layers=9)]), r"layer 9 is out of range; .* 0-2"),
    "layers unreadable": (lambda s: s.lens(TEXT, layers="middle"), r"'middle'.*for example"),
    "layers empty": (lambda s: s.lens(TEXT, layers="2:2"), r"'2:2' name no block; the model has blocks 0-2"),
    "layers of another type": (lambda s: s.lens(TEXT, layers=1.5), r"1\.5 cannot be read; give an int"),
    "unknown site": (lambda s: s.lens(TEXT, sites="mlp_in"), r"'mlp_in' is unknown; one of resid_pre, ln1_out"),
    "unknown site among known": (
        lambda s: s.capture(TEXT, sites=["resid_pre", "x"]),
        r"'x' is unknown; one of resid_pre",
    ),
    "no site": (lambda s: s.lens(TEXT, sites=[]), r"at least one site, such as resid_post"),
    "site of a comparison": (lambda s: s.compare(TEXT, site="x"), r"'x' is unknown; one of resid_pre"),
    "unknown lens": (lambda s: s.lens(TEXT, lens="tuned"), r"'tuned' is unknown; one of logit, or the path of a lens"),
    "unknown lens option": (
        lambda s: s.generate(TEXT, 2, lens={"layer": 1}),
        r"'layer' is unknown; one of layers, sites",
    ),
    "top_k of none": (lambda s: s.lens(TEXT, top_k=0), rf"top_k must be between 1 and {VOCAB_SIZE}, got 0"),
    "top_k beyond the vocabulary": (lambda s: s.lens(TEXT, top_k=10**6), r"got 1000000"),
    "target of several tokens": (lambda s: s.lens(TEXT, targets=["xyzzy"]), r"' xyzzy' is \d tokens .*a target is one"),
    "target id out of range": (
        lambda s: s.lens(TEXT, targets=[999]),
        rf"999 is outside the vocabulary of {VOCAB_SIZE}",
    ),
    # prompts
    "empty text": (lambda s: s.lens(""), r"the prompt is empty"),
    "empty ids": (lambda s: s.generate([], 3), r"the prompt is empty"),
    "empty text among others": (lambda s: s.generate(["a", ""], 3), r"the prompt is empty"),
    "empty ids among others": (lambda s: s.lens([[5], []]), r"the prompt is empty"),
    "prompt longer than the context": (lambda s: s.lens(LONG), r"129 tokens, 128 fit the model's context"),
    "no room left for what is generated": (lambda s: s.generate(LONG[:120], 9), r"120 tokens, 119 fit"),
    "no room at all": (lambda s: s.lens(TEXT, generate=200), r"tokens, 0 fit"),
    "contrast text too long": (lambda s: s.extract("x", [("the " * 200, "a")]), r"\d+ tokens, 128 fit"),
    "token id out of range": (lambda s: s.lens([5, VOCAB_SIZE]), rf"token id {VOCAB_SIZE} is outside the vocabulary"),
    "negative token id": (lambda s: s.lens([5, -1]), r"token id -1 is outside the vocabulary"),
    "prompt of another type": (lambda s: s.lens(None), r"text, token ids, messages, or a list of these; got NoneType"),
    "text and ids mixed up": (lambda s: s.lens([5, "a"]), r"text, token ids, messages, or a list of these"),
    "a list of nothing": (lambda s: s.lens([None]), r"text, token ids, messages, or a list of these"),
    "ids with fractions": (lambda s: s.lens([1.5, 2.0]), r"text, token ids, messages, or a list of these"),
    "ids too deep": (lambda s: s.lens([[[1]]]), r"got a list with"),
    "several prompts to compare": (lambda s: s.compare([TEXT, TEXT]), r"compare takes one prompt"),
    "several prompts to sweep": (lambda s: s.sweep([TEXT, TEXT], "v"), r"sweep takes one prompt"),
    "chat without a template": (lambda s: s.generate(TEXT, 2, chat=True), r"no chat template; leave chat out"),
    # vectors and coefficients
    "unknown vector": (lambda s: s.generate(TEXT, 2, steer={"cheer": 1}), r"'cheer' is unknown; one of v"),
    "unknown vector of a Steer": (lambda s: s.lens(TEXT, steer=[Steer("cheer")]), r"'cheer' is unknown; one of v"),
    "unknown vector to set": (lambda s: s.steer({"cheer": 1}), r"'cheer' is unknown; one of v"),
    "unknown vector to sweep": (lambda s: s.sweep(TEXT, "cheer"), r"'cheer' is unknown; one of v"),
    "unknown vector to look at": (lambda s: s.vectors["cheer"], r"'cheer' is unknown; one of v"),
    "unknown vector to delete": (lambda s: s.vectors.__delitem__("cheer"), r"'cheer' is unknown; one of v"),
    "coefficient NaN": (lambda s: s.steer({"v": float("nan")}), r"coefficient of 'v' must be finite, got nan"),
    "coefficient infinite": (lambda s: s.generate(TEXT, 2, steer={"v": float("inf")}), r"must be finite, got inf"),
    "coefficient of a Steer": (lambda s: Steer("v", -float("inf")), r"must be finite, got -inf"),
    "coefficient in a sweep": (lambda s: s.sweep(TEXT, "v", [0, np.nan]), r"of 'v' must be finite, got nan"),
    "coefficient beyond float32": (lambda s: s.generate(TEXT, 2, steer={"v": 1e300}), r"'v' must be .*1e\+300"),
    "coefficient no number": (lambda s: s.steer({"v": "strong"}), r"'v' must be a number, got 'strong'"),
    "no coefficient": (lambda s: s.sweep(TEXT, "v", []), r"sweep needs a list .* got \[\]"),
    "coefficients without an end": (
        lambda s: s.sweep(TEXT, "v", count()),
        r"coefficients must be a list that ends; count\(\d+\) has more than 10,000 ",
    ),
    "coefficients as bytes": (lambda s: s.sweep(TEXT, "v", b"ab"), r"coefficients must be a list, got b'ab'"),
    "coefficients of a measurement as bytes": (
        lambda s: nblens.Measurement(b"ab"),
        r"coefficients must be a list, got b'ab'",
    ),
    "positions as bytes": (lambda s: s.capture(TEXT, positions=b"\0\1"), r"positions must be a list, got b"),
    "targets as bytes": (lambda s: s.lens(TEXT, targets=b"ab"), r"targets must be a list, got b'ab'"),
    "a bare coefficient to sweep": (lambda s: s.sweep(TEXT, "v", 2.0), r"coefficients, got 2\.0"),
    "layers without an end": (lambda s: s.lens(TEXT, layers=count()), r"layers count\(.*do not end"),
    "sites without an end": (
        lambda s: s.lens(TEXT, sites=repeat("resid_pre")),
        r"sites must be a list that ends; repeat\('resid_pre'\) has more than 1,000,000",
    ),
    "targets without an end": (
        lambda s: s.lens(TEXT, targets=repeat(5)),
        r"targets must be a list that ends; repeat\(5\)",
    ),
    "metrics without an end": (lambda s: s.lens(TEXT, metrics=repeat("kl")), r"metrics must be a list that ends"),
    "positions without an end": (lambda s: s.capture(TEXT, positions=count()), r"positions must be a list that ends"),
    "seeds without an end": (
        lambda s: s.generate(TEXT, 2, seed=count()),
        "seed must be one number, or one for each .* more",
    ),
    "answers that are read once": (
        lambda s: s.sweep(TEXT, "v", [1], 2, answers=iter([" a", " b"])),
        r"answers are two texts .*got <list_iterator",
    ),
    "coefficients of a measurement without an end": (
        lambda s: nblens.Measurement(count()),
        r"coefficients must be a list that ends; count",
    ),
    "steers without an end": (lambda s: s.lens(TEXT, steer=repeat(Steer("v"))), r"steer must be a list that ends"),
    "steers without an end to generate": (lambda s: s.generate(TEXT, 2, steer=repeat(3)), r"steer must be a list that"),
    "steer that is none": (lambda s: s.lens(TEXT, steer=3), r"nblens\.Steer values, got 3"),
    "steer of another type": (lambda s: s.lens(TEXT, steer=[("v", 1.0)]), r"nblens\.Steer values, got \('v', 1\.0\)"),
    "steer a bare name": (lambda s: s.lens(TEXT, steer="v"), r"nblens\.Steer values, got 'v'"),
    "nothing steers": (lambda s: s.compare(TEXT, steer={}), r'nothing steers; give steer=\{"name": coefficient\}'),
    "unknown write position": (
        lambda s: Steer("v", 1.0, write="first"),
        r"'first' is unknown; one of all, prompt, generated",
    ),
    "unknown operation": (lambda s: Steer("v", 1.0, op="multiply"), r"'multiply' is unknown; one of add, ablate"),
    "name that cannot be typed": (lambda s: s.extract("a b", PAIRS), r"letters, digits, .*got 'a b'"),
    # extraction
    "no pairs": (lambda s: s.extract("x", []), r"no contrast pairs; give \(positive text, negative text\) tuples"),
    "half a pair": (
        lambda s: s.extract("x", [*PAIRS, ("a",)]),
        r"pair 3 must be \(positive text, negative text\), got",
    ),
    "a string for a pair": (lambda s: s.extract("x", ["ab"]), r"pair 1 must be .*got 'ab'"),
    "an empty half": (lambda s: s.extract("x", [*PAIRS, ("a", "")]), r"pair 3.*empty"),
    "unknown method": (lambda s: s.extract("x", PAIRS, method="pca"), r"'pca' is unknown; one of mean_diff"),
    "unknown extraction site": (lambda s: s.extract("x", PAIRS, site="q"), r"'q' is unknown; one of resid_pre"),
    "unknown read position": (
        lambda s: s.extract("x", PAIRS, read="first"),
        r"'first' is unknown; one of last, label, mean, an",
    ),
    "read position outside": (lambda s: s.extract("x", PAIRS, read=40), r"position 40 is outside a text of \d tokens"),
    "extraction layer": (lambda s: s.extract("x", PAIRS, layers=5), r"layer 5 is out of range; .* 0-2"),
    # generation
    "no new tokens": (lambda s: s.generate(TEXT, 0), r"max_new_tokens must be 1 or more, got 0"),
    "a negative number to generate": (lambda s: s.lens(TEXT, generate=-1), r"0 or more, got -1"),
    "a broken number to generate": (lambda s: s.capture(TEXT, generate=1.5), r"0 or more, got 1\.5"),
    "temperature below zero": (
        lambda s: s.generate(TEXT, 2, temperature=-1),
        r"0 \(greedy\) or a positive number, got -1",
    ),
    "temperature NaN": (lambda s: s.lens(TEXT, generate=2, temperature=float("nan")), r"positive number, got nan"),
    "unknown generation option": (lambda s: s.generate(TEXT, 2, top_q=0.5), r"'top_q' is unknown"),
    "beam search": (lambda s: s.generate(TEXT, 2, num_beams=3), r"beam search is not supported: beams reorder"),
}
