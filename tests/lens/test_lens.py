"""A lens as a value: its formula, its file, and what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from lenses import exact_translators, make_lens

import nblens
from nblens.errors import FileFormatError, UserError
from nblens.files import read_safetensors, write_safetensors
from nblens.lens.lens import Lens

EVERYTHING = {
    "model": "tiny",
    "fit": {"n_texts": 3, "steps": 2, "learning_rate": 0.25, "seed": 7},
    "data_hash": "ab12",
    "kl_before": {0: 2.0, 1: 1.0},
    "kl_after": {0: 0.5, 1: 0.25},
}


@pytest.fixture(params=["tuned", "jacobian"])
def kind(request):
    return request.param


@pytest.mark.parametrize("depth", [0, 2])
def test_a_translation_is_its_formula_rounded_once(kind, depth):
    lens = make_lens(kind)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(500, lens.d_model, generator=generator)
    exact = exact_translators(lens)[depth]
    torch.testing.assert_close(lens.translate(hidden, depth), exact(hidden).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(lens.translate(hidden.double(), depth), exact(hidden), rtol=0, atol=1e-12)
    half = lens.translate(hidden.bfloat16(), depth)
    expected = exact(hidden.bfloat16()).bfloat16()
    assert half.dtype == torch.bfloat16
    assert (half == expected).float().mean() > 0.999  # a float32 sum may fall on the other side of a rounding
    torch.testing.assert_close(half, expected, rtol=2**-7, atol=1e-6)


def test_a_translation_leaves_its_input_as_it_was(kind):
    hidden = torch.randn(4, 32)
    before = hidden.clone()
    make_lens(kind).translate(hidden, 0)
    assert (hidden == before).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_saved_lens_comes_back(tmp_path, kind, dtype):
    lens = make_lens(kind, dtype=dtype, **EVERYTHING)
    path = lens.save(tmp_path / "a.safetensors")
    again = Lens.load(path)
    assert list(again.weights) == list(lens.weights)
    assert list(again.biases) == list(lens.biases)
    for part in ("weights", "biases"):
        for depth, tensor in getattr(lens, part).items():
            torch.testing.assert_close(getattr(again, part)[depth].float(), tensor.float(), rtol=0, atol=0)
    for name in ("name", "kind", "model", "n_blocks", "fit", "data_hash", "kl_before", "kl_after"):
        assert getattr(again, name) == getattr(lens, name), name
    assert Lens.load(path, "other").name == "other"
    assert set(read_safetensors(path)[1]) == {"format", "version", "fields"}


def test_a_lens_is_public_and_says_what_it_is():
    assert nblens.Lens is Lens
    assert repr(make_lens(**EVERYTHING)) == (
        "Lens('made', tuned, 3 depths × 32 of tiny, fitted to 3 texts, held-out KL 1.5 → 0.375 nats)"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "linear"}, "lens kind 'linear' is unknown; one of tuned, jacobian"),
        ({"weights": {}}, "'made' holds no translator"),
        ({"weights": {-1: torch.eye(32)}}, "a translator for depth -1"),
        (
            {"weights": {0: torch.eye(32), 1: torch.eye(31)}},
            r"weights at depth 1 .* have shape \(31, 31\), not \(32, 32\)",
        ),
        ({"weights": {0: torch.zeros(32, 31)}}, r"\(32, 31\), not \(32, 32\)"),
        ({"weights": {0: torch.zeros(())}}, r"have shape \(\), not \(0, 0\)"),
        ({"weights": {0: torch.zeros(0, 0)}}, r"have shape \(0, 0\), not \(0, 0\)"),
        ({"weights": {0: np.eye(32)}}, "must be a torch.Tensor, got ndarray"),
        ({"weights": {0: torch.eye(32).int()}}, "not a plain tensor of floating-point numbers"),
        ({"weights": {0: torch.eye(32, dtype=torch.complex64)}}, "not a plain tensor of floating-point numbers"),
        ({"weights": {0: torch.eye(32).to_sparse()}}, "not a plain tensor of floating-point numbers"),
        ({"weights": {0: torch.eye(32, device="meta")}}, "not a plain tensor of floating-point numbers"),
        ({"weights": {0: torch.zeros(1).expand(32, 32)}}, "are larger than their data"),
        ({"weights": {0: torch.full((32, 32), torch.nan)}}, "weights at depth 0 of lens 'made' are not finite"),
        ({"biases": {0: torch.full((32,), torch.inf)}}, "biases at depth 0 of lens 'made' are not finite"),
        ({"biases": {0: torch.zeros(31)}}, r"biases at depth 0 .* \(31,\), not \(32,\)"),
        ({"biases": {9: torch.zeros(32)}}, "a bias but no weight at depth 9"),
        ({"kind": "jacobian"}, "a jacobian lens has no bias"),
    ],
)
def test_translators_that_are_none_are_refused(change, message):
    with pytest.raises(UserError, match=message) as raised:
        replace(make_lens(), **({"biases": {}} if "weights" in change else {}), **change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("n_blocks", "d_model", "known"), [(4, 32, True), (2, 32, True), (3, 64, True), (2, 32, False), (3, 64, False)]
)
def test_a_lens_of_another_model_is_refused_with_both_shapes(n_blocks, d_model, known):
    lens = make_lens(model="tiny") if known else replace(make_lens(), n_blocks=0)
    origin = r"3 blocks × 32 \(tiny\)" if known else r"3 or more blocks × 32 \(unknown model\)"
    with pytest.raises(UserError, match=rf"made for {origin}; the loaded model has {n_blocks} blocks × {d_model}"):
        lens.check_fits(n_blocks=n_blocks, d_model=d_model)


def test_a_lens_that_does_not_know_its_model_fits_any_deep_enough():
    lens = replace(make_lens(), n_blocks=0)
    lens.check_fits(n_blocks=3, d_model=32)
    lens.check_fits(n_blocks=40, d_model=32)


def damaged(tmp_path, *, drop=(), add=None, metadata=None, **changes):
    """A saved lens whose arrays, metadata or fields were tampered with."""
    arrays, header = read_safetensors(make_lens(**EVERYTHING).save(tmp_path / "sound"))
    plain = {**json.loads(header["fields"]), **changes}
    header = {**header, "fields": json.dumps({k: v for k, v in plain.items() if k not in drop}), **(metadata or {})}
    return write_safetensors(tmp_path / "a.safetensors", {**arrays, **(add or {})}, header)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "linear"},
        {"kind": ["tuned"]},
        {"name": 3},
        {"n_blocks": "many"},
        {"n_blocks": float("inf")},
        {"kl_before": [1.0]},
        {"kl_after": {"x": 1.0}},
        {"fit": 3},
        {"drop": ["model"]},
        {"drop": ["fit"]},
        {"more": 1},
        {"weights": {}},
        {"add": {"weight.1.0": np.zeros((32, 32), np.float32)}},
        {"add": {"weight.x": np.zeros((32, 32), np.float32)}},
        {"add": {"scale.0": np.zeros((32, 32), np.float32)}},
        {"add": {"weight.7": np.zeros((32, 31), np.float32)}},
        {"add": {"weight.0": np.full((32, 32), np.nan, np.float32)}},
        {"add": {"weight.0": np.zeros((32, 32), np.int32)}},
        {"add": {"bias.0": np.zeros((1,), np.float32)}},
        {"metadata": {"fields": "{"}},
        {"metadata": {"fields": "[]"}},
        {"metadata": {"fields": "[" * 100_000}},
    ],
    ids=str,
)
def test_a_damaged_or_hostile_file_is_refused(tmp_path, change):
    with pytest.raises(FileFormatError, match="a.safetensors is damaged: ") as raised:
        Lens.load(damaged(tmp_path, **change))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "nblens.trajectory"}, r"is not a lens \(format: nblens.trajectory\)"),
        ({"version": "2"}, "is a lens of version 2; this nblens reads version 1"),
    ],
)
def test_a_file_of_another_format_is_refused(tmp_path, metadata, message):
    with pytest.raises(FileFormatError, match=message):
        Lens.load(damaged(tmp_path, metadata=metadata))


def test_a_file_that_is_not_there_is_the_users_mistake(tmp_path):
    for name in ("none.safetensors", "none.pt"):
        with pytest.raises(UserError, match=f"cannot read .*{name}") as raised:
            Lens.load(tmp_path / name)
        assert not isinstance(raised.value, FileFormatError)
