"""What examples/false_alarms_digits.py counts is there in an audit, and is counted right."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return runpy.run_path(str(EXAMPLES / "false_alarms_digits.py"))


def test_every_alarm_reads_an_audit(audited, script):
    numbers = {one["name"]: one for one in audited.numbers() if "class" not in one}
    for alarm, given in script["ALARMS"].items():
        assert given(numbers) in (True, False), alarm
    # Of an untrained network some readings are plain.
    share = numbers["common_mode_share"]["mean"]
    assert script["ALARMS"]["common mode: half of the class map or more"](numbers) == (share >= 0.5)


def test_shares_are_of_seeds(script):
    alarms = list(script["ALARMS"])
    given, silent = dict.fromkeys(alarms, True), dict.fromkeys(alarms, False)
    seeds = [{"honest": given, "control": silent}, *[{"honest": silent, "control": silent}] * 3]
    table = script["table"](seeds)
    assert list(table["rows"]) == alarms
    for row in table["rows"].values():
        assert (row["honest"]["value"], row["honest"]["count"]) == (0.25, 4)
        assert row["control"]["value"] == 0.0
