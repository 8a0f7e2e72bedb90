"""Edit, then capture, for the length of a `with` block."""

import pytest
import torch
from tiny_models import prompt_ids, tiny_model
from torch import nn

from nblens.model.hooks import HookPoint, Instrumentation, hidden_of


class Block(nn.Module):
    """Adds one; returns what a block of its kind returns."""

    def __init__(self, returns=lambda hidden: hidden):
        super().__init__()
        self._returns = returns

    def forward(self, hidden_states, *rest, **options):
        self.got = (rest, options)
        return self._returns(hidden_states + 1)


class Captured(list):
    def __call__(self, hidden):
        self.append(hidden.clone())


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


ZEROS = torch.zeros(1, 2, 3)


def test_an_output_is_edited_then_captured():
    block, captured = Block(), Captured()
    with Instrumentation([HookPoint(block, edit=lambda h: h * 10, capture=captured)]):
        out = block(ZEROS)
    assert torch.equal(out, ZEROS + 10)
    assert [c.tolist() for c in captured] == [out.tolist()]


def test_capturing_alone_returns_the_modules_own_output():
    result = (ZEROS, "cache")
    block, captured = Block(lambda hidden: result), Captured()
    with Instrumentation([HookPoint(block, capture=captured)]):
        assert block(ZEROS) is result
    assert torch.equal(captured[0], ZEROS)


@pytest.mark.parametrize("kind", [tuple, list])
def test_only_the_first_of_several_outputs_is_edited(kind):
    block, captured = Block(lambda hidden: kind([hidden, "cache", 7])), Captured()
    with Instrumentation([HookPoint(block, edit=lambda h: h * 10, capture=captured)]):
        hidden, *rest = block(ZEROS)
    assert torch.equal(hidden, ZEROS + 10)
    assert rest == ["cache", 7]
    assert torch.equal(captured[0], hidden)


@pytest.mark.parametrize("by_name", [False, True])
def test_an_input_is_edited_then_captured_and_the_other_arguments_pass(by_name):
    block, captured = Block(), Captured()
    with Instrumentation([HookPoint(block, "input", edit=lambda h: h + 5, capture=captured)]):
        out = block(hidden_states=ZEROS, mask=3) if by_name else block(ZEROS, "first", mask=3)
    assert torch.equal(captured[0], ZEROS + 5)
    assert torch.equal(out, ZEROS + 6)
    assert block.got == (() if by_name else ("first",), {"mask": 3})


def test_an_input_only_captured_goes_in_unchanged():
    block, captured = Block(), Captured()
    with Instrumentation([HookPoint(block, "input", capture=captured)]):
        assert torch.equal(block(ZEROS), ZEROS + 1)
    assert torch.equal(captured[0], ZEROS)


def test_a_later_point_sees_the_edits_of_an_earlier_one():
    first, second, captured = Block(), Block(), Captured()
    points = [
        HookPoint(second, "input", capture=captured),
        HookPoint(first, edit=lambda h: h * 2),
        HookPoint(second, "output", capture=captured),
    ]
    with Instrumentation(points):
        second(first(ZEROS))
    assert [c.flatten()[0].item() for c in captured] == [2, 3]


def test_hooks_live_as_long_as_the_with_block():
    block, captured = Block(), Captured()
    instrumentation = Instrumentation([HookPoint(block, edit=lambda h: h * 10, capture=captured)])
    assert hook_count(block) == 0
    with instrumentation:
        assert hook_count(block) == 1
    assert hook_count(block) == 0
    assert torch.equal(block(ZEROS), ZEROS + 1)
    assert captured == []


def test_hooks_are_removed_when_the_block_raises():
    block = Block()
    points = [HookPoint(block, edit=lambda h: h), HookPoint(block, "input", capture=lambda h: None)]
    with pytest.raises(ZeroDivisionError), Instrumentation(points):
        1 / hook_count(nn.Identity())
    assert hook_count(block) == 0


def test_hooks_are_removed_when_an_edit_raises():
    block = Block()

    def fail(hidden):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Instrumentation([HookPoint(block, edit=fail)]):
        block(ZEROS)
    assert hook_count(block) == 0


def test_when_the_second_of_two_cannot_be_attached_the_first_is_removed():
    block = Block()
    instrumentation = Instrumentation([HookPoint(block, edit=lambda h: h), HookPoint(None)])
    with pytest.raises(AttributeError), instrumentation:
        pass
    assert hook_count(block) == 0


def test_other_hooks_of_the_model_stay_and_keep_working():
    block, seen = Block(), []
    block.register_forward_hook(lambda *_: seen.append("after"))
    block.register_forward_pre_hook(lambda *_: seen.append("before"))
    with Instrumentation([HookPoint(block, edit=lambda h: h * 10)]):
        block(ZEROS)
    block(ZEROS)
    assert hook_count(block) == 2
    assert seen == ["before", "after", "before", "after"]


def test_hidden_states_are_the_tensor_or_the_first_of_several():
    assert hidden_of(ZEROS) is ZEROS
    assert hidden_of((ZEROS, None)) is ZEROS
    assert hidden_of([ZEROS]) is ZEROS


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "falcon"])  # blocks that return a tensor, and a tuple
def test_adding_to_a_block_of_a_model_is_adding_to_the_next_ones_input(family):
    model = tiny_model(family)
    blocks = model.get_submodule("model.layers" if family == "llama" else "transformer.h")
    ids, captured = torch.tensor([prompt_ids(5)]), Captured()
    plain = model(input_ids=ids).logits
    points = [
        HookPoint(blocks[0], capture=captured),
        HookPoint(blocks[1], "input", edit=lambda h: h + 0.5, capture=captured),
    ]
    with Instrumentation(points):
        through_input = model(input_ids=ids).logits
    assert torch.equal(captured[1], captured[0] + 0.5)
    with Instrumentation([HookPoint(blocks[0], edit=lambda h: h + 0.5)]):
        assert torch.equal(model(input_ids=ids).logits, through_input)
    assert not torch.allclose(through_input, plain)
    assert torch.equal(model(input_ids=ids).logits, plain)
