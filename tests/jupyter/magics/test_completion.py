import pytest
from IPython.core.completer import provisionalcompleter


@pytest.fixture
def complete(shell):
    """Texts of a cell after each completion at its end."""

    def complete(source):
        with provisionalcompleter():
            found = list(shell.Completer.completions(source, len(source)))
        return [source[: item.start] + item.text for item in found]

    return complete


@pytest.fixture
def vectors(session):
    session.extract("cheerful", [("the cat", "the dog"), ("a man", "a house")])
    session.extract("formal", [("the cat", "the dog"), ("a man", "a house")])


def test_options_complete(complete):
    assert complete("%lens --la") == ["%lens --layers"]
    assert complete("%%lens --co") == ["%%lens --compare"]
    assert complete("%generate --max") == ["%generate --max-new-tokens"]
    assert complete("%load_sharded --tr") == ["%load_sharded --trust-remote-code"]
    assert complete("%%steer x --me") == ["%%steer x --method"]
    assert set(complete("%lens -")) > {"%lens --top-k", "%lens -o", "%lens --steer"}


def test_options_complete_after_others_and_in_an_assignment(complete):
    assert complete("%lens --top-k 3 --compare --met") == ["%lens --top-k 3 --compare --metric"]
    assert complete("t = %lens --met") == ["t = %lens --metric"]


@pytest.mark.parametrize("start", ["%lens --metric ", "%lens --metric=", "%%lens --top-k 3 --metric "])
def test_metrics_complete(complete, start):
    assert sorted(complete(start)) == sorted(start + metric for metric in ("prob", "entropy", "kl", "rank"))
    assert complete(start + "en") == [start + "entropy"]


def test_vector_names_complete(complete, vectors):
    assert complete("%lens --steer ch") == ["%lens --steer cheerful="]
    assert complete("%%generate --compare --steer f") == ["%%generate --compare --steer formal="]
    assert complete("%steer cheerful=1 f") == ["%steer cheerful=1 formal="]
    assert complete("%steer show c") == ["%steer show cheerful"]
    assert complete("%steer save f") == ["%steer save formal"]


def test_lenses_complete(complete, session, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert complete("%lens --lens lo") == ["%lens --lens logit"]
    session.fit_lens(["the cat sat on the mat", "the dog ran"], steps=1)
    assert sorted(complete("%lens --lens ")) == ["%lens --lens logit", "%lens --lens tuned"]
    assert complete("%%lens --top-k 3 --lens=tu") == ["%%lens --top-k 3 --lens=tuned"]


def test_commands_of_steer_complete(complete, vectors):
    assert set(complete("%steer ")) == {
        "%steer off", "%steer list", "%steer save", "%steer load", "%steer show",
        "%steer extract", "%steer sweep", "%steer remove", "%steer rename",
        "%steer eval", "%steer experiment", "%steer cheerful=", "%steer formal=",
    }  # fmt: skip
    assert complete("%steer li") == ["%steer list"]


def test_sites_methods_positions_and_layers_complete(complete, session):
    assert complete("%lens --sites resid_po") == ["%lens --sites resid_post"]
    assert complete("%lens --sites resid_pre,resid_po") == ["%lens --sites resid_pre,resid_post"]
    assert complete("%%steer x --method me") == ["%%steer x --method mean_diff"]
    assert complete("%%steer x --write gen") == ["%%steer x --write generated"]
    assert complete("%%steer x --method ") == [
        "%%steer x --method " + name for name in ("logistic", "mean_diff", "pca_center", "pca_diff")
    ]
    assert complete("%steer extract x f.csv --method pca_d") == ["%steer extract x f.csv --method pca_diff"]
    assert complete("%%steer x --read me") == ["%%steer x --read mean", "%%steer x --read mean+special"]
    assert complete("%%steer x --read la") == ["%%steer x --read label", "%%steer x --read last"]
    assert "%lens --layers 0-2" in complete("%lens --layers ")
    assert "%lens --layers 0-2" in complete("%lens --layers 0")


def test_nothing_of_ours_completes_in_a_prompt(complete, session):
    for source in ("%lens The --met", "%%lens\n--met", "%lens --top-k 3 The off", "lens --met", "x = 1\n%%lens --met"):
        assert not [text for text in complete(source) if text.endswith(("--metric", "offload"))]


def test_files_still_complete(complete, session, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cheerful_vector.safetensors").touch()
    assert "%steer load cheerful_vector.safetensors" in complete("%steer load cheerful_v")
    assert "%lens --lens cheerful_vector.safetensors" in complete("%lens --lens cheerful_v")
    (tmp_path / "control_vector.gguf").touch()
    assert complete("%steer load control_v") == ["%steer load control_vector.gguf"]


PATHS = (
    "%load_sharded ", "%load_sharded --gguf ", "%load_sharded x --adapter ", "%load_sharded --offload=", "%steer load ",
    "%steer load v ", "%steer save cheerful ", "%steer experiment new ", "%steer eval cheerful ", "%steer extract new ",
    "%steer experiment new x.csv --ood ", "%lens --save ", "%lens --lens ", "%%lens --top-k 3 --save=",
)  # fmt: skip


@pytest.mark.parametrize("start", PATHS)
def test_paths_complete_for_what_takes_one(complete, vectors, tmp_path, monkeypatch, start):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.gguf").touch()
    (tmp_path / "models" / "tiny_adapter").mkdir()
    assert complete(f"{start}mod") == [f"{start}models/"]
    assert complete(f"{start}models/tiny.") == [f"{start}models/tiny.gguf"]
    assert complete(f"{start}models/tiny_") == [f"{start}models/tiny_adapter/"]
    assert complete(f"{start}{tmp_path}/mod") == [f"{start}{tmp_path}/models/"]
    assert complete(f"{start}./nowhere/x") == []


def test_names_complete_where_one_stands(complete, vectors):
    for command in ("remove", "rename", "save", "show", "eval"):
        assert complete(f"%steer {command} ch") == [f"%steer {command} cheerful"]
    assert complete("%steer rename cheerful ch") == []


def test_without_a_model_there_are_no_vectors(complete):
    assert complete("%lens --steer ") == ["%lens --steer off"]
