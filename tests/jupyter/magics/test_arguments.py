import pytest

from nblens.errors import UserError
from nblens.jupyter.magics.arguments import GENERATE, LENS, LOAD, coefficients, contrast_pairs
from nblens.jupyter.magics.steer_arguments import EXTRACT, STEER

PARSERS = [LENS, GENERATE, LOAD, STEER, EXTRACT]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("The capital of  France is", "The capital of  France is"),
        ("  spaces around  ", "spaces around"),
        ('" spaces kept "', " spaces kept "),
        ("'it said \"no\"'", 'it said "no"'),
        ('"one" and "two"', '"one" and "two"'),
        ("it's", "it's"),
        ('"', '"'),
        ("- item", "- item"),
        ("-5 degrees", "-5 degrees"),
        ("--- rule", "--- rule"),
        ("-- --top-k is an option", "--top-k is an option"),
        ('-- "quoted"', '"quoted"'),
        ("naïve 中文 🙂 {x} $x", "naïve 中文 🙂 {x} $x"),
        ("--top-k 3 text", "text"),
        ("--top-k=3 text", "text"),
        ("--layers '0-1, 2' text", "text"),
        ("", ""),
    ],
)
def test_text_stays_as_typed(line, text):
    options = LENS.parse_line(line)
    assert options.text == text
    assert not options.silent


@pytest.mark.parametrize(
    ("line", "silent", "text"), [("a;", True, "a"), ("a ; ", True, "a"), ('"a;"', False, "a;"), ('"a";', True, "a")]
)
def test_a_semicolon_at_the_end_of_the_line_silences(line, silent, text):
    options = LENS.parse_line(line)
    assert (options.silent, options.text) == (silent, text)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--layers -4-", "layers", "-4-"),
        ("--layers -1 x", "layers", "-1"),
        ('--layers "0-4, 10" x', "layers", "0-4, 10"),
        ("--seed -1", "seed", -1),
        ("--sites resid_pre,resid_post x", "sites", ["resid_pre", "resid_post"]),
        ("--sites resid_pre x", "sites", "resid_pre"),
        ("--targets ' Paris' --targets=' Rome' x", "targets", [" Paris", " Rome"]),
        ("--steer a=1 b=-2.5 c=.5 x=y is", "steer", ["a=1", "b=-2.5", "c=.5"]),
        ("--steer a=1 --steer=b=2 x", "steer", ["a=1", "b=2"]),
        ("--steer off x", "steer", ["off"]),
        ("--save 'my grid.html' x", "save", ["my grid.html"]),
        ("-o name x", "output", "name"),
        ("-o=name x", "output", "name"),
    ],
)
def test_values_of_options(line, name, value):
    assert getattr(LENS.parse_line(line), name) == value


def test_words_and_options_mix_where_there_is_no_text():
    options = STEER.parse_line("a=1.5 --write generated b=-1 --layers 0-1")
    assert options.words == ["a=1.5", "b=-1"]
    assert (options.write, options.layers) == ("generated", "0-1")
    options = LOAD.parse_line("'my model' --max-memory 0=20GiB --max-memory cpu=60GiB --dtype float16;")
    assert options.words == ["my model"]
    assert options.max_memory == [(0, "20GiB"), ("cpu", "60GiB")]
    assert options.silent


@pytest.mark.parametrize(("word", "read"), [("last", "last"), ("mean", "mean"), ("-2", -2), ("3", 3)])
def test_a_read_position_is_a_name_or_an_index(word, read):
    assert EXTRACT.parse_line(f"x --read {word}").read == read


@pytest.mark.parametrize(
    ("parser", "line", "message"),
    [
        (LENS, "--topk 3 x", "%lens: option --topk is unknown; did you mean --top-k?"),
        (LENS, "--nope x", "%lens: option --nope is unknown; see %lens --help (put -- before"),
        (LENS, "-z x", "%lens: option -z is unknown"),
        (LENS, "--layers", "%lens: --layers needs a value"),
        (LENS, "--compare=1 x", "%lens: --compare takes no value, got '1'"),
        (LENS, '--layers "0-3 x', 'a quote is not closed in: "0-3 x'),
        (LENS, "--top-k x y", "%lens: --top-k: invalid int value: 'x'"),
        (LENS, "--metric foo x", "%lens: --metric: invalid choice: 'foo' (choose from"),
        (LENS, "The capital --top-k 3", "%lens: --top-k stands after the text; options come first"),
        (LENS, "The capital --top-k=3", "%lens: --top-k=3 stands after the text"),
        (LOAD, "x --max-memory 20GiB", "write DEVICE=SIZE, such as 0=20GiB or cpu=60GiB; got '20GiB'"),
        (EXTRACT, "x --write nowhere", "%%steer: --write: write position 'nowhere' is unknown; one of all"),
        (GENERATE, "--max-new-tokens 1.5 x", "invalid int value: '1.5'"),
    ],
)
def test_mistakes_name_the_value_and_what_would_do(parser, line, message):
    with pytest.raises(UserError) as error:
        parser.parse_line(line)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("parser", PARSERS)
def test_help_names_every_option(parser):
    text = parser.format_help()
    assert text.startswith(f"usage: {parser.prog.replace('%%lens', '%lens')}")
    assert "examples:" in text
    for name in parser.options:
        assert name in text
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text


def test_coefficients_are_numbers():
    assert coefficients(["a=1.5", "b.c-d=-1", "e=1e-1"]) == {"a": 1.5, "b.c-d": -1.0, "e": 0.1}


@pytest.mark.parametrize("word", ["a", "a=", "=1", "a=b", "a=1,5", "a==1"])
def test_what_is_no_coefficient_is_refused(word):
    with pytest.raises(UserError, match=r"steering is set as NAME=NUMBER, such as cheerful=1.5; got"):
        coefficients([word])


def test_contrast_pairs_are_read_as_typed():
    body = "# a comment\n+ So {x} happy \n- So sad\n\n   \n+no space\n-  two spaces"
    assert contrast_pairs(body) == [("So {x} happy ", "So sad"), ("no space", " two spaces")]


def test_contrast_pairs_may_be_grouped_by_sign():
    assert contrast_pairs("+ a\n+ b\n- c\n- d") == [("a", "c"), ("b", "d")]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("+ a\n- b\nhappy", "line 4: begin with + or -, then the text; got 'happy'"),
        ("+ a\n-", "line 3: there is no text after -"),
        ("+ a\n- b\n+ c", "line 4: this + has no - to go with it"),
        ("- a\n+ b\n- c\n", "line 4: this - has no + to go with it"),
        (" + a", "line 2: begin with + or -, then the text; got ' + a'"),
        ("# only a comment", "there are no contrast pairs; write '+ text' and '- text', one per line"),
    ],
)
def test_malformed_pairs_name_the_line_of_the_cell(body, message):
    with pytest.raises(UserError) as error:
        contrast_pairs(body)
    assert str(error.value) == message
