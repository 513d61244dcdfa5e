"""From parameters to the architecture that they are of."""

from functools import cache

from torchvision import models as torchvision_models

from diffsal.models.fitting import without_initialization
from diffsal.models.recognition import ARCHITECTURES, _backbone_size

NAMES = torchvision_models.list_models(module=torchvision_models)


@cache
def hollow(name, **arguments):
    """A model whose parameters have shapes, but no memory and no values."""
    if name in ("googlenet", "inception_v3"):
        arguments = {"init_weights": True, **arguments}
    with without_initialization():
        return torchvision_models.get_model(name, weights=None, **arguments)


def test_table_is_torchvisions():
    table = {}
    for name in NAMES:
        state = hollow(name).state_dict()
        table.setdefault(next(iter(state)), {})[name] = _backbone_size(state)
    assert table == ARCHITECTURES
    sizes = {(stem, *size) for stem, family in table.items() for size in family.values()}
    assert len(sizes) == len(NAMES) == 80
