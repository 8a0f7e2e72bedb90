import random
import time

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex

from nblens.colors import DIFFERENCE_COLORS, MAGNITUDE_COLORS, Scale, contrast, ink
from nblens.text import changed_words, display_width, fit, percent, plain, short_number, visible, whole_characters


@pytest.mark.parametrize("color", [*MAGNITUDE_COLORS, *DIFFERENCE_COLORS])
def test_text_has_enough_contrast_on_every_colour(color):
    assert contrast(ink(color), color) >= 4.5


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    assert contrast("#ffffff", "#777777") == contrast("#777777", "#ffffff")


def test_magnitudes_are_viridis():
    expected = [to_hex(colormaps["viridis"](at)) for at in np.linspace(0, 1, 64)]
    assert list(MAGNITUDE_COLORS) == expected


def test_differences_run_from_blue_over_white_to_orange():
    red, green, blue = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in DIFFERENCE_COLORS]).T
    assert len(DIFFERENCE_COLORS) % 2 == 1
    assert DIFFERENCE_COLORS[31] == "#f7f7f7"
    assert (blue[:31] > red[:31]).all()
    assert (red[32:] > green[32:]).all()
    assert (green[32:] > blue[32:]).all()


def test_a_probability_scale_always_runs_from_0_to_1():
    scale = Scale.magnitude("prob", np.array([0.2, 0.3]))
    assert scale.levels(np.array([0.0, 0.5, 1.0, np.nan])).tolist() == [0, 32, 63, -1]
    assert scale.ticks() == [(0.0, "0"), (0.5, "0.5"), (1.0, "1")]


@pytest.mark.parametrize(("top", "high"), [(6.73, 6.8), (6.8, 6.8), (0.0121, 0.013), (123.4, 130.0), (0.0, 1.0)])
def test_a_scale_ends_at_the_largest_value_rounded_up(top, high):
    values = np.array([0.0, top / 2, top, np.nan, np.inf])
    assert Scale.magnitude("entropy", values).high == pytest.approx(high)


def test_one_scale_covers_all_that_share_it():
    assert Scale.magnitude("kl", np.array([1.0]), np.array([2.0, 3.0])).high == 3.0


def test_ranks_are_logarithmic_and_rank_1_is_bright():
    scale = Scale.magnitude("rank", np.array([1, 700]))
    assert scale.positions([1, 10, 100, 1000]) == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert [text for _, text in scale.ticks()] == ["1k", "100", "10", "1"]
    assert np.diff([at for at, _ in scale.ticks()]) == pytest.approx([1 / 3] * 3)


def test_zero_difference_is_exactly_white_and_signs_are_symmetric():
    scale = Scale.difference("prob", np.array([-0.5, 0.0, 0.25]))
    assert scale.levels(np.array([-0.5, -0.25, 0.0, 0.25, 0.5])).tolist() == [0, 16, 31, 46, 62]
    assert [text for _, text in scale.ticks()] == ["−0.5", "0", "+0.5"]


def test_a_difference_can_share_the_units_of_a_magnitude():
    assert Scale.difference("prob", np.array([0.1]), high=1.0).levels(np.array([0.1]))[0] == 34


def test_values_outside_a_scale_are_drawn_at_its_end():
    assert Scale.difference("kl", np.array([1.0])).levels(np.array([-9.0, 9.0])).tolist() == [0, 62]


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" Paris", "·Paris"),
        ("a\n\tb", "a⏎⇥b"),
        ("", "∅"),
        ("\x00\x1f\x7f", "⟨00⟩⟨1F⟩⟨7F⟩"),
        ("\u202eabc", "⟨202E⟩abc"),
        ("\u200b\ufeff", "⟨200B⟩⟨FEFF⟩"),
        ("\ud800", "⟨D800⟩"),
        ("\u0301", "◌\u0301"),
        ("中文", "中文"),
        ("<b>&", "<b>&"),
    ],
)
def test_what_cannot_be_seen_is_made_visible(token, shown):
    assert visible(token) == shown


def test_running_text_keeps_its_layout_and_its_joiners():
    assert plain("a\n b\t👩\u200d🚀\u202ec\x00") == "a\n b\t👩\u200d🚀⟨202E⟩c⟨00⟩"


@pytest.mark.parametrize(
    ("text", "cut"), [("abcde", "abcde"), ("abcdef", "abcd…"), ("中文字", "中文…"), ("e\u0301bcde", "e\u0301bcde")]
)
def test_text_is_cut_by_the_columns_it_takes(text, cut):
    assert fit(text, 5) == cut
    assert display_width(cut) <= 5


@pytest.mark.parametrize(
    ("probability", "shown"), [(1.0, "100.0%"), (0.9714, "97.1%"), (0.0099, "1.0%"), (0.00034, "0.034%"), (0, "0.0%")]
)
def test_probabilities_keep_two_digits(probability, shown):
    assert percent(probability) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.5, "0.5"),
        (-1.234, "−1.23"),
        (10_000, "10k"),
        (5_440_000, "5.44M"),
        (float("inf"), "∞"),
        (float("-inf"), "−∞"),
    ],
)
def test_numbers_are_short(value, shown):
    assert short_number(value) == shown


def marked(one, other, **options):
    """The words that only one of two texts has."""
    return tuple(
        [word for text, changed in side if changed for word in text.split()]
        for side in changed_words(one, other, **options)
    )


@pytest.mark.parametrize(
    ("one", "other", "changed"),
    [
        ("a b c", "a b c", ([], [])),
        ("a b c", "a x c", (["b"], ["x"])),
        ("a b", "a b c d", ([], ["c", "d"])),
        ("", "a", ([], ["a"])),
        ("the cat sat on the mat", "the dog sat on a mat", (["cat", "the"], ["dog", "a"])),
        ("x y z q w", "q w", (["x", "y", "z"], [])),
        ("one\ntwo", " one two \n", ([], [])),
    ],
)
def test_changed_words(one, other, changed):
    assert marked(one, other) == changed


def test_parts_are_the_text_and_marks_begin_with_a_word():
    rng = random.Random(0)
    for _ in range(200):
        texts = ["".join(rng.choices(["a", "b", " ", "\n", "é", "\U0001f600"], k=rng.randrange(30))) for _ in range(2)]
        sides = changed_words(*texts)
        assert ["".join(text for text, _ in side) for side in sides] == texts
        assert not any(changed and text != text.lstrip() for side in sides for text, changed in side)
    assert changed_words("", "") == ([], [])


def drawn_words(seed, n):
    """Words as often as in prose: few are common."""
    return random.Random(seed).choices([f"w{i}" for i in range(400)], [1 / (1 + i) for i in range(400)], k=n)


@pytest.mark.parametrize("lag", [0, 9])
@pytest.mark.parametrize("seed", range(5))
def test_marks_stay_while_texts_grow(seed, lag):
    """A word that was once found in the other text stays found, whichever of the two is ahead."""
    base, steered = ["it", "was", *drawn_words(seed, 80)], ["it", "was", "not", *drawn_words(seed + 99, 80)]
    before = [], []
    for n in range(1, len(steered) + lag + 1):
        texts = " ".join(base[: max(1, n - lag)]), " ".join(steered[:n])
        sides = changed_words(*texts, growing=n < len(steered) + lag)
        marks = [[changed for text, changed in side for _ in text.split()] for side in sides]
        for old, new in zip(before, marks, strict=True):
            assert all(was or not now for was, now in zip(old, new, strict=False))
        before = marks
    assert sum(map(sum, marks)) < 0.9 * len(base + steered)


def test_words_are_compared_between_two_messages():
    """A panel sends forty messages a second; the worst is many words that are all in both texts."""
    for n, most in ((40, 0.001), (500, 0.003)):
        texts = " ".join(drawn_words(1, n)), " ".join(drawn_words(2, n))
        took = []
        for _ in range(20):
            began = time.perf_counter()
            changed_words(*texts, growing=True)
            took.append(time.perf_counter() - began)
        print(f"{n} words: {1000 * min(took):.2f} ms")
        assert min(took) < most
    texts = [" ".join(f"w{i * step % 97}" for i in range(1600)) for step in (7, 11)]
    began = time.perf_counter()
    changed_words(*texts)
    assert time.perf_counter() - began < 0.3


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([b"\xf0\x9f", b"\x98\x80"], "😀 😀"),
        ([b" \xe9\x82", b"\xa3\xe4", b"\xbd\xa0"], "那 那你 你"),  # one token, parts of two characters
        ([b"a\xc3", None, b"\xa9"], "- - -"),
        ([b"\xe9", b"\xe9", b"\x82", b"\xa3", b"\x82"], "- 那 那 那 -"),
        ([None, b"\xc3\xa9\xff", b"\xc3"], "- - -"),  # a whole one needs no neighbour
        ([], ""),
    ],
)
def test_characters_are_those_that_neighbours_make_together(parts, expected):
    assert whole_characters(parts) == tuple(word.replace("-", "") for word in expected.split())
