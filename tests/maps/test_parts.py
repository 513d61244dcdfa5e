"""What a walk over a model found is used again, and no change is missed."""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffsal import capture, explain
from diffsal.maps.parts import modules_of


def network():
    inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def replace_leaf(model):
    model[0][2] = nn.GELU()


def add_to_leaf(model):
    model[3].add_module("drop", nn.Dropout())


def remove(model):
    del model[0][1]


def swap(model):
    model[1], model[2] = model[2], model[1]


def share(model):
    model[1] = model[0]


def change_kind(model):
    model[0][2].__class__ = nn.ReLU6


def stand_in(model):
    model._modules["3"] = None


CHANGES = [replace_leaf, add_to_leaf, remove, swap, share, change_kind, stand_in]


@given(st.lists(st.sampled_from(CHANGES[:-1]), max_size=4))
def test_is_what_torch_finds_after_any_changes(changes):
    model = network()
    assert modules_of(model)[0] == list(model.modules())
    for change in changes:
        try:
            change(model)
        except (IndexError, KeyError, TypeError, AttributeError):
            continue  # what it would change is gone
        assert modules_of(model)[0] == list(model.modules())


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_another_walk(change):
    model = network()
    before = modules_of(model)[1]
    assert modules_of(model)[1] is before
    change(model)
    modules, walk = modules_of(model)
    assert walk is not before
    assert modules == list(model.modules())


def test_a_copy_is_walked_by_itself():
    model = network()
    modules_of(model)
    twin = copy.deepcopy(model)
    assert modules_of(twin)[0] == list(twin.modules())
    assert modules_of(twin)[0][1] is not modules_of(model)[0][1]


def test_what_is_known_of_a_model_does_not_hold_it():
    model = network()
    model[0].parent_of = [model]  # a reference back, as some networks have
    modules_of(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_module_that_replaces_another_is_checked():
    model = network()
    with capture(model):
        pass
    with torch.inference_mode():
        made = nn.Linear(4, 2)
    model[3] = made
    with pytest.raises(Exception, match="inference mode"):
        capture(model)


def test_weights_that_are_replaced_in_inference_mode_are_told_when_the_model_runs():
    model, images = network().eval(), torch.rand(1, 3, 4, 4).double()
    explain(model.float(), images.float())
    with torch.inference_mode():
        model.double()
    with pytest.raises(Exception, match="outside torch"):
        explain(model, images)
