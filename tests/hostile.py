"""What careless users and hostile files bring: texts, tokens, names of files and damaged contents of files."""

import pickle
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from nblens import UserError

TOKENS = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "'\"><svg/onload=alert(1)>",
    "&lt;b&gt;&amp;&#60;",
    "javascript:alert(1)//`${alert(1)}`",
    "$\\frac{1}{0}$ \\(x\\) $$\\input{/etc/passwd}$$",
    "$",
    "\\",
    "\x1b[31m\x1b]0;title\x07\x9b2J",
    "\x00\x08\x7f\r\n\t",
    "\u202etxt.exe\u2066\u200b\ufeff",
    "\ud800",
    "[x](javascript:alert(1)) **b** `c`",
    "{0.__class__} %s %(x)d {{x}}",
    "\u0301" * 4,
    "",
)
"""Texts that mean something to a page, a terminal, a formatter, LaTeX or Markdown."""

ANY_TEXT = st.one_of(
    st.text(max_size=40),
    st.text(st.characters(categories=["Cs", "Cc", "Cf", "Co", "Zl", "Zp", "Mn", "Nd"]), max_size=20),
    st.sampled_from(TOKENS),
)
"""Any Unicode, half characters included."""


def bounded(examples: int) -> settings:
    """So many examples where the profile draws Hypothesis' usual hundred, more where it draws more."""
    return settings(max_examples=max(1, examples * settings.default.max_examples // 100))


def value_or_line(call: Callable[[], Any], refusals: type | tuple[type, ...] = UserError) -> Any:
    """What a call gives, or None where it was refused in one line; anything else that it raises is a defect."""
    try:
        return call()
    except refusals as error:
        assert_short_line(error)
        return None


def assert_short_line(error: BaseException) -> None:
    """One line, of characters that any terminal shows as they are."""
    message = str(error)
    assert message
    assert message.isprintable(), ascii(message)


RUN: list[str] = []
"""traces of code that a file brought; an error would look like any other damage"""


def _run() -> None:
    RUN.append("run")


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _run, ()


FOREIGN = {
    "empty": b"",
    "text": b"just some text that is longer than eight bytes",
    "a pickle": pickle.dumps({"a": Bomb()}),
    "a zip": b"PK\x03\x04" + b"\0" * 40,
    "a header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header of a gigabyte": struct.pack("<Q", 2**30) + b"{}",
    "a header of ten million brackets": struct.pack("<Q", 10**7) + b"[" * 10**7,
    "GGUF and a count of 2**64": b"GGUF\x03\0\0\0" + b"\xff" * 16,
}
"""Contents that no file of ours has."""


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """A file with some of its bytes changed, cut or repeated."""
    content = bytearray(sound)
    # half of them hit the header, where a byte means most
    reach = draw(st.sampled_from([min(len(content), 400), len(content)]))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, reach - 1))
        kind = draw(st.sampled_from(["bit", "bytes", "cut", "insert"]))
        if kind == "bit":
            content[min(place, len(content) - 1)] ^= 1 << draw(st.integers(0, 7))
        elif kind == "bytes":
            content[place : place + 8] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "cut" and place:
            del content[place:]
        else:
            content[place:place] = draw(st.binary(min_size=1, max_size=8))
        if not content:
            break
        reach = min(reach, len(content))
    return bytes(content)
