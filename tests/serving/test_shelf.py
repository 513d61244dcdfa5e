from concurrent.futures import ThreadPoolExecutor

import pytest

from diffsal.serving import shelf as module
from diffsal.serving.shelf import GoneError, Kept, Shelf


def test_the_least_recently_used_goes_first(served, picture) -> None:
    given = picture(served())
    shelf = Shelf(most_bytes=2 * Kept(given).size())
    first, second = shelf.put(given), shelf.put(given)
    shelf.get(first)
    third = shelf.put(given)
    assert shelf.get(first).picture is shelf.get(third).picture
    with pytest.raises(GoneError, match="not here any more"):
        shelf.get(second)


def test_one_is_kept_whatever_its_size(served, picture) -> None:
    shelf = Shelf(most_bytes=1)
    shelf.get(shelf.put(picture(served())))


@pytest.mark.parametrize("token", [None, "", "guess", 7, ["x"]])
def test_who_has_no_token_gets_nothing(served, picture, token) -> None:
    shelf = Shelf()
    shelf.put(picture(served()))
    with pytest.raises(GoneError):
        shelf.get(token)


def test_tokens_are_long_and_all_different(served, picture) -> None:
    shelf, given = Shelf(), picture(served())
    tokens = {shelf.put(given) for _ in range(50)}
    assert len(tokens) == 50
    assert min(map(len, tokens)) >= 20


def test_a_shift_is_fitted_once_however_many_ask(served, picture, monkeypatch) -> None:
    calls = []
    fit = module.fit_shift
    monkeypatch.setattr(module, "fit_shift", lambda *given: calls.append(given) or fit(*given))
    one = served()
    kept = Kept(picture(one))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: kept.shift(one, "edges"), range(4)))
    assert len(calls) == 1
    assert all(shift is found[0] for shift in found)
    assert kept.shift(one, "corner") is not found[0]
