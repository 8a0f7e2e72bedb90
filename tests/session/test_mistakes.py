"""What is neither a value nor a name is refused in one line."""

import pytest
from sessions import PROMPT

from nblens import UserError

MISTAKES = {
    "a slice without a step": (lambda s: s.capture(PROMPT, positions=slice(None, None, 0)), "positions slice"),
    "half a position": (lambda s: s.capture(PROMPT, positions=1.5), "positions must be indices"),
    "a truth for a position": (lambda s: s.capture(PROMPT, positions=True), "positions must be indices"),
    "a number for a file": (lambda s: s.capture(PROMPT, to=5), "to must be the path of a file, got 5"),
    "no sites": (lambda s: s.lens(PROMPT, sites=None), "sites must be names such as resid_post, got None"),
    "sites of sites": (lambda s: s.lens(PROMPT, sites=[["attn_out"]]), "sites must be names"),
    "no metrics": (lambda s: s.lens(PROMPT, metrics=None), "metrics must be names"),
    "half a target": (lambda s: s.lens(PROMPT, targets=3.5), "targets must be tokens, as text or ids, got 3.5"),
    "a name for lens options": (lambda s: s.generate(PROMPT, 2, lens="logit"), "lens must be True, or a dict"),
    "an unknown option of compare": (lambda s: s.compare(PROMPT, steer={"v": 1}, sitez="x"), "'sitez' is unknown"),
    "half a position of a plot": (lambda s: s.attribute(PROMPT, [7]).plot(1.5), "position 1.5 is outside"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line(session, what):
    ask, message = MISTAKES[what]
    with pytest.raises(UserError, match=message) as mistake:
        ask(session)
    assert "\n" not in str(mistake.value)
    assert session.lens(PROMPT).n_tokens == len(PROMPT)
