"""`%load_sharded --plan` and the refusal of a model that does not fit."""

import pytest
from tiny_models import tiny_model, tiny_tokenizer

import nblens
from nblens.jupyter.display import plan_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=8192).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_plan_is_returned_bound_and_shown_as_a_table(run, shell, folder):
    done = run(
        f"%load_sharded {folder} --plan --max-memory 0=8GiB --max-memory 1=8GiB --tp 2 --context 64 --batch 3 -o p"
    )
    plan = shell.user_ns["p"]
    assert done.value is plan
    expected = nblens.plan(str(folder), max_memory={0: "8GiB", 1: "8GiB"}, tp=2, context=64, batch=3)
    assert plan == expected
    (bundle,) = done.displayed
    assert bundle["text/plain"] == repr(plan)
    assert bundle["text/html"] == plan_table(plan)._repr_html_()
    assert bundle["text/html"].count("<tr>") == 3
    with pytest.raises(nblens.NoModelError):
        nblens.current()


def test_without_a_name_the_built_in_model_is_planned(run):
    plan = run("%load_sharded --plan").value
    assert (plan.model, plan.n_blocks, plan.fits) == ("nblens-demo", 12, True)


def test_a_refusal_shows_the_table_and_one_line(run, folder):
    before = run("%load_sharded").value
    done = run(f"%load_sharded {folder} --max-memory cpu=41MiB --devices cpu")
    (bundle,) = done.displayed
    assert "it does not fit" in bundle["text/plain"]
    assert bundle["text/plain"].count("\n") == 3
    assert f"{folder} was not loaded: it does not fit; what would: " in done.stderr
    assert done.stderr.count("\n") <= 1
    assert nblens.current() is before


def test_options_of_a_plan_need_it(run):
    assert "--context goes with --plan" in run("%load_sharded --context 64").stderr
    assert "--batch goes with --plan" in run("%load_sharded --batch 2").stderr
