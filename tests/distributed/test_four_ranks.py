"""The built-in model over four ranks: more than two stages, and a vocabulary in four parts."""

import pytest
from distributed.conftest import load_beside
from distributed.test_ranks_agree import same_generation, same_trajectory

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]


@pytest.mark.parametrize("spread", [{"tp": 4}, {"pp": 4}], ids=["tp", "pp"])
def test_four_ranks_are_one_model(cluster, spread):
    one, four = load_beside(None), load_beside(None, **spread)
    prompts = ["In Warsaw you pay with the", "The capital of France is"]
    for row, other in zip(*(session.lens(prompts, generate=6) for session in (one, four)), strict=True):
        same_trajectory(row, other)
    same_generation(*(session.generate("The summer was", 20, steer={"v": 0.02}) for session in (one, four)))
    assert len(four.placement.devices) == 4
    four.unload()
    one.unload()
