"""What several processes do when something goes wrong, and that they change course at the same step."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import psutil
import pytest
from distributed.conftest import load_beside

import nblens
from nblens import Interrupted, NumericalError, UnsupportedModelError, UserError, WorkerError, loading
from nblens.backends.rank import Rank
from nblens.backends.rank_messages import LoadOrder
from nblens.backends.ray_cluster import RayBackend
from nblens.session import Session

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]


def over_two_ranks():
    """The built-in model over two ranks: a text of 400 tokens takes it seconds."""
    session = load_beside(None, tp=2)
    yield session
    session.unload()


@pytest.fixture
def mortal(cluster):
    """Ranks that a test may kill."""
    yield from over_two_ranks()


@pytest.fixture(scope="module")
def demo(cluster):
    """Ranks for all tests that leave them usable."""
    yield from over_two_ranks()


def later(seconds, action):
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_stops_all_ranks_and_the_next_request_works(demo):
    timer = later(0.6, lambda: os.kill(os.getpid(), signal.SIGINT))
    began = time.monotonic()
    with pytest.raises(Interrupted) as stopped:
        demo.generate("The summer was", 400, min_new_tokens=400)
    assert time.monotonic() - began < 5
    timer.join()
    assert 0 < len(stopped.value.partial.token_ids) < 400
    assert demo.generate("The capital of France is", 2).text.startswith(" Paris")


def test_an_error_of_every_rank_leaves_them_usable(demo):
    with pytest.raises(UserError, match="max_time is not supported over several processes"):
        demo.generate("The summer was", 5, max_time=1.0)
    assert demo.generate("The capital of France is", 2).text.startswith(" Paris")


def test_a_killed_rank_is_named_and_another_load_works(mortal):
    later(0.5, lambda: os.kill(mortal.backend.pids[1], signal.SIGKILL))
    with pytest.raises(WorkerError, match="rank 1 of 2 failed: its process died") as error:
        mortal.generate("The summer was", 400, min_new_tokens=400)
    assert "all ranks were stopped; load the model again with %load_sharded" in str(error.value)
    for pid in mortal.backend.pids:
        gone(psutil.Process(pid) if psutil.pid_exists(pid) else None, 5)
    with pytest.raises(WorkerError, match="load the model again"):
        mortal.generate("The summer was", 2)
    again = load_beside(None, tp=2)
    assert again.generate("The capital of France is", 2).text.startswith(" Paris")
    again.unload()


def test_the_error_of_a_killed_rank_comes_soon(mortal):
    killed = []

    def kill():
        killed.append(time.monotonic())
        os.kill(mortal.backend.pids[0], signal.SIGKILL)

    later(0.5, kill)
    with pytest.raises(WorkerError, match="rank 0 of 2 failed"):
        mortal.generate("The summer was", 400, min_new_tokens=400)
    assert time.monotonic() - killed[0] < 5


def gone(process, seconds):
    """Wait until a process has ended; one that nobody waits for has, too."""
    deadline = time.monotonic() + seconds
    while process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, process
        time.sleep(0.1)


def script(source):
    """Run a script of its own, which begins a cluster of its own; its output can be read."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(source)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_node_that_leaves_in_mid_run_is_an_error_with_a_name():
    run = script("""
        import threading, time
        from ray.cluster_utils import Cluster
        import nblens
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        other = cluster.add_node(num_cpus=1)
        session = nblens.load(tp=2, ray=cluster.address)
        print(session.generate("The capital of France is", 2).text, len(session.placement.devices))
        threading.Timer(0.5, lambda: cluster.remove_node(other, allow_graceful=False)).start()
        began = time.monotonic()
        try:
            session.generate("The summer was", 400, min_new_tokens=400)
        except nblens.WorkerError as error:
            print(str(error).splitlines()[0], time.monotonic() - began < 30)
    """)
    output, errors = run.communicate(timeout=100)
    assert " Paris. 2\n" in output, errors
    (line,) = [line for line in output.splitlines() if line.startswith("rank ")]  # Ray prints what it saw, too
    assert "of 2 failed: " in line
    assert line.endswith("True")


def test_a_change_of_coefficients_takes_effect_at_the_same_step_on_every_rank(cluster, saved):
    # written here, the class goes to the ranks by value
    class Recording(Rank):
        def _control(self, number):
            control = super()._control(number)
            if control is not None and not hasattr(control, "taken"):
                control.taken = self.taken = []
                take = control.take_coefficients

                def recorded():
                    taken = take()
                    control.taken.append(dict(taken))
                    return taken

                control.take_coefficients = recorded
            return control

        def record(self):
            return self.taken

    path = saved("llama, an odd vocabulary")
    backend = RayBackend(LoadOrder(str(path), {}, "auto", 0, tp=2), actor=Recording)
    loading._current = None
    one = load_beside(path)
    session = Session(backend, one.tokenizer, backend.placement, config=one.model.config, architecture=backend.facts)
    session.vectors["v"] = one.vectors["v"]
    session.steer({"v": 0.0})
    stopping = threading.Event()

    def turn():
        value = 0.0
        while not stopping.wait(0.004):
            value += 0.125
            session.steer({"v": value})

    turner = threading.Thread(target=turn)
    turner.start()
    out = session.generate("the cat sat", 80)
    stopping.set()
    turner.join()
    first, second = backend.ask("record")
    session.unload()
    one.unload()
    assert len(out.token_ids) == 80
    assert len(first) == 80
    assert first == second
    assert sum(bool(change) for change in first) > 5


def test_a_model_that_cannot_be_spread_is_refused_before_the_old_one_goes(demo, saved, tmp_path):
    from tiny_models import tiny_model, tiny_tokenizer

    loading._current = demo
    for family, options, message in (
        ("llama", {"tp": 4}, "tp=4 does not divide the 2 key-value heads"),
        ("gpt2", {"tp": 2}, "no tensor-parallel plan for gpt2"),
        ("llama", {"tp": 2, "pp": 2}, "cannot be combined"),
        ("llama", {"tp": 2, "max_memory": {"cpu": "1GiB"}}, "max_memory cannot be given with tp or pp"),
    ):
        tiny_model(family).save_pretrained(tmp_path / family)
        tiny_tokenizer().save_pretrained(tmp_path / family)
        with pytest.raises(UserError, match=message):
            nblens.load(str(tmp_path / family), **options)
    assert nblens.current() is demo
    loading._current = None
    assert demo.generate("The capital of France is", 2).text.startswith(" Paris")


def test_ranks_without_room_or_files_are_refused_before_the_old_model_goes(demo, tmp_path):
    loading._current = demo
    with pytest.raises(UserError, match="12 ranks need as many CPUs; the cluster has 6"):
        nblens.load(pp=12)
    assert nblens.current() is demo
    loading._current = None
    went = []
    order = LoadOrder(str(tmp_path), {}, "auto", 0, tp=2)  # a folder that is here, but not what a rank needs of it
    with pytest.raises(UserError, match="cannot load"):
        RayBackend(order, make_room=lambda: went.append("the old model"))
    assert went == []
    assert demo.generate("The capital of France is", 2).text.startswith(" Paris")


@pytest.fixture
def talking():
    """A kind of rank, defined where it is pickled with its code."""

    class Talking(Rank):
        """Rank 1 has something to say while it loads, and every rank in each request."""

        def _load(self, order):
            joined = super()._load(order)
            if self._rank == 1:
                logging.getLogger("transformers.some.module").warning("lm_head was initialized")
            return joined

        def _serve(self, *args):
            warnings.warn("slow kernel", UserWarning, stacklevel=1)
            return super()._serve(*args)

        def shapes(self):
            from torch.distributed.tensor import DTensor

            parameters = self._engine.runner.model.named_parameters()
            experts = {name: weight for name, weight in parameters if "experts.down_proj" in name}
            return [tuple((w.to_local() if isinstance(w, DTensor) else w).shape) for w in experts.values()]

    return Talking


def test_what_ranks_log_is_logged_here(cluster, saved, talking, caplog):
    path = saved("qwen3_moe")
    one = load_beside(path)
    with caplog.at_level(logging.WARNING, "nblens.ranks"):
        backend = RayBackend(LoadOrder(str(path), {}, "auto", 0, tp=2, ep=2), actor=talking)
        said = [record.getMessage() for record in caplog.records]
        caplog.clear()
        session = Session(
            backend, one.tokenizer, backend.placement, config=one.model.config, architecture=backend.facts
        )
        session.generate("the cat", 1)
        session.unload()  # the request's end comes after its result
        (record,) = caplog.records
    one.unload()
    assert "rank 1: lm_head was initialized" in said
    assert record.getMessage().startswith("all ranks: ")
    assert "UserWarning: slow kernel" in record.getMessage()


def test_expert_parallelism_deals_whole_experts_out(cluster, saved, talking):
    path = saved("qwen3_moe")
    for options, experts in (({"tp": 2}, 4), ({"tp": 2, "ep": 2}, 2)):
        backend = RayBackend(LoadOrder(str(path), {}, "auto", 0, **options), actor=talking)
        shapes = backend.ask("shapes")[0]
        backend.close()
        assert {shape[0] for shape in shapes} == {experts}


def test_a_weight_that_breaks_is_named_by_the_rank_that_has_it(cluster, saved):
    class Spoiled(Rank):
        """Rank 1 loses a number of a weight."""

        def spoil(self, name):
            if self._rank == 1:
                self._engine.runner.model.get_parameter(name).detach()[0, 0] = float("nan")

    path = saved("llama, an odd vocabulary")
    one = load_beside(path)
    backend = RayBackend(LoadOrder(str(path), {}, "auto", 0, pp=2), actor=Spoiled)
    session = Session(backend, one.tokenizer, backend.placement, config=one.model.config, architecture=backend.facts)
    one.unload()
    backend.ask("spoil", "model.layers.2.mlp.down_proj.weight")
    with pytest.raises(NumericalError, match="first in block 2 at .*; its mlp.down_proj.weight holds such values$"):
        session.generate("the cat sat", 3)
    session.unload()


def test_a_model_with_a_broken_weight_is_refused_by_its_name_over_ranks(cluster, tmp_path):
    from tiny_models import tiny_model, tiny_tokenizer

    model = tiny_model("llama")
    model.model.layers[2].mlp.down_proj.weight.data[-1, -1] = float("nan")  # of the last rank's part
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loading._current = None
    with pytest.raises(
        UnsupportedModelError, match=r"its model\.layers\.2\.mlp\.down_proj\.weight holds values that are"
    ):
        nblens.load(str(tmp_path), tp=2)


def test_the_model_itself_is_not_here(demo):
    with pytest.raises(UserError, match="spread over several processes"):
        demo.model  # noqa: B018
