"""Lines and bodies of any kind to all four magics: a result or one line of `UsageError`; nothing else changes."""

import pytest
from hostile import ANY_TEXT, TOKENS, bounded
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.error import UsageError
from mistakes import state, steered
from steered_runs import endless_model

# Names of files are of the folder that the test works in: a line must not write anywhere else.
FILES = st.sampled_from(
    ["v.safetensors", "t.json", "t.html", "t.png", "v.gguf", "p.csv", "p.jsonl", "no/such/folder/v.gguf", "..", ".",
     "a\tb.json", "", "\u202e.html", "x" * 300]
)  # fmt: skip
PROSE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/~{$\\"), max_size=15)
# A number of tokens is small, so that an example takes milliseconds.
NUMBERS = st.one_of(
    st.sampled_from(["0", "1", "3", "-1", "1.5", "nan", "inf", "1e400", "9" * 5000, "0x1", "١", "1_0"]), PROSE
)
OPTIONS = {
    "--layers": st.one_of(st.sampled_from(["0", "::2", "0-9", "9" * 5000, "-", ":::"]), PROSE),
    "--sites": st.one_of(st.sampled_from(["resid_pre", "resid_pre,mlp_out", ",", "x"]), PROSE),
    "--site": PROSE,
    "--top-k": NUMBERS,
    "--targets": PROSE,
    "--lens": PROSE,
    "--generate": NUMBERS,
    "--max-new-tokens": NUMBERS,
    "--temperature": NUMBERS,
    "--top-p": NUMBERS,
    "--seed": NUMBERS,
    "--metric": st.one_of(st.sampled_from(["kl", "rank"]), PROSE),
    "--steer": st.one_of(st.sampled_from(["v=1", "off", "v=nan", "w=1", "=1", "v=", "v=1e300"]), PROSE),
    "--save": FILES,
    "-o": st.sampled_from(["result", "2x", "a b", "__class__", ""]),
    "--method": st.one_of(st.sampled_from(["pca_diff", "logistic"]), PROSE),
    "--read": st.one_of(st.sampled_from(["last", "mean", "3-1", "99", "-99"]), PROSE),
    "--write": st.one_of(st.sampled_from(["all", "last", "9-4"]), PROSE),
    "--op": st.one_of(st.sampled_from(["ablate", "clamp"]), PROSE),
    "--coefficients": st.one_of(st.sampled_from(["0,1", "nan", ","]), PROSE),
    "--answers": PROSE,
    "--context": NUMBERS,
    "--tp": NUMBERS,
    "--max-memory": st.one_of(st.sampled_from(["cpu=1GiB", "=", "0=x", "cpu=-1"]), PROSE),
    "--dtype": PROSE,
    "--devices": PROSE,
}
FLAGS = ["--compare", "--static", "--chat", "--template", "--help", "--once", "--plan", "--status", "--nonsense", ";"]


@st.composite
def lines(draw, starts):
    """A magic's line: options with their values, words and text, quoted or not."""
    parts = [draw(starts)]
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["option", "option", "flag", "text", "quoted"]))
        if kind == "option":
            name = draw(st.sampled_from(sorted(OPTIONS)))
            parts.append(f"{name}{draw(st.sampled_from([' ', '=', ' ']))}{draw(OPTIONS[name])}")
        elif kind == "flag":
            parts.append(draw(st.sampled_from(FLAGS)))
        else:
            quote = "" if kind == "text" else draw(st.sampled_from("\"'"))
            parts.append(f"{quote}{draw(PROSE)}{quote}")
    return " ".join(parts)


PAIR_BODIES = st.lists(
    st.tuples(st.sampled_from(["+ ", "- ", "+", "-", "", "#", " +"]), ANY_TEXT).map("".join), max_size=5
).map("\n".join)


@pytest.fixture
def session(shell, attach, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return steered(attach(endless_model("llama")))


@pytest.fixture
def answered(shell, session):
    """Give a magic a line, and perhaps a body; True where it was carried out, False where it was refused."""

    def answered(magic, line, body=None):
        try:
            if body is None:
                shell.run_line_magic(magic, line)
            else:
                shell.run_cell_magic(magic, line, body)
        except UsageError as refused:
            message = str(refused)
            assert message
            assert message.isprintable(), ascii(message)
            return False
        finally:
            shell.user_ns.pop("result", None)
        return True

    return answered


@pytest.mark.parametrize("magic", ["lens", "generate"])
def test_any_line_reads_or_is_refused(answered, session, capsys, magic):
    before = state(session)
    few = st.just({"generate": "--max-new-tokens 1"}.get(magic, "--top-k 2"))

    @bounded(90)
    @given(line=lines(few), body=st.one_of(st.none(), ANY_TEXT))
    def check(line, body):
        answered(magic, line, body)

    check()
    assert state(session) == before


def test_any_line_steers_or_is_refused(answered, session, capsys):
    before = state(session)
    starts = st.sampled_from(
        ["", "off", "list", "show v", "save v", "load", "v=1", "w=2", "sweep v", "eval v", "experiment v", "extract w"]
    )

    @bounded(90)
    @given(line=lines(starts), file=st.one_of(st.just(""), FILES))
    def check(line, file):
        answered("steer", f"{line} {file}")
        for name in set(session.vectors) - {"v"}:
            del session.vectors[name]
        session.steer.off()
        steered(session)

    check()
    assert state(session) == before


def test_any_body_of_pairs_makes_a_vector_or_is_refused(answered, session, capsys):
    before = state(session)

    @bounded(90)
    @given(line=lines(st.just("w")), body=PAIR_BODIES)
    def check(line, body):
        answered("steer", line, body)
        for name in set(session.vectors) - {"v"}:
            del session.vectors[name]

    check()
    assert state(session) == before


def test_any_line_plans_or_is_refused(answered, session, capsys):
    """`--status` or `--plan` last, so that nothing is loaded in the place of the session's model."""
    before = state(session)

    @bounded(60)
    @given(line=lines(PROSE), last=st.sampled_from(["--status", "--plan"]))
    def check(line, last):
        if "--unload" not in line:
            answered("load_sharded", f"{line.replace(';', '')} {last}")

    check()
    assert state(session) == before


@pytest.mark.parametrize("token", TOKENS, ids=ascii)
def test_what_a_line_quotes_reaches_no_terminal(refused, session, token):
    word = token.replace("\n", " ").replace("{", "(").replace("}", ")").replace("$", "").replace("\\", "").strip()
    if "\ud800" in word or "?" in word:
        pytest.skip("not what a front end sends on a line")
    message = refused(f"%%lens --layers 99\nthe {token}")
    assert message == "layer 99 is out of range; the model has blocks 0-2"
    assert refused(f"%%steer w\n? {word}").isprintable()
