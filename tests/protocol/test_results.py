"""A folder of results is read back, finished or not, printed and drawn."""

import json
import shutil

import pytest
from click.testing import CliRunner
from PIL import Image

from diffsal.cli.main import main
from diffsal.protocol.jobs import run
from diffsal.protocol.results import read_results


def test_unfinished_results_are_read_and_say_so(tmp_path, grid, refused):
    with refused("no protocol.json here"):
        read_results(tmp_path)
    run(grid, tmp_path, shard=(1, 4), device="cpu")
    assert read_results(tmp_path).missing == 6
    file = next((tmp_path / "jobs").iterdir())
    content = file.read_text("utf-8")
    # What a write that was cut off leaves behind, and what somebody put there, are no results.
    (tmp_path / "jobs" / ".scratch.json").write_text(content, "utf-8")
    (tmp_path / "jobs" / "copy.json").write_text(content, "utf-8")
    assert len(read_results(tmp_path).jobs) == 2
    file.write_text('{"hash": "0"}', "utf-8")
    with refused("is damaged; remove it and run again"):
        read_results(tmp_path)
    file.write_text(content[:100], "utf-8")
    with refused("cannot be read"):
        read_results(tmp_path)
    file.write_text(json.dumps({**json.loads(content), "hash": "0"}), "utf-8")
    with refused("is of another protocol"):
        read_results(tmp_path)


def test_files_of_experiment_a_without_a_control_are_refused(done, tmp_path, refused):
    out = tmp_path / "copy"
    shutil.copytree(done, out, ignore=shutil.ignore_patterns("cache", "plots"))
    methods, fooling = (
        out / "jobs" / name
        for name in ("tiles--contrast--dot--seed0.json", "tiles--fooling--in-set--seed0.json")
    )
    set_version(methods, None)  # which are as they were
    assert len(read_results(out).jobs) == 10
    set_version(fooling, None)
    with refused("has format 1, which this diffsal does not read; remove it and run again"):
        read_results(out)
    set_version(fooling, 2)
    set_version(methods, 3)
    with refused("has format 3"):
        read_results(out)


def set_version(file, version):
    content = json.loads(file.read_text("utf-8"))
    content["format_version"] = version
    if version is None:
        del content["format_version"]
    file.write_text(json.dumps(content), "utf-8")


@pytest.fixture
def nothing_drawn(monkeypatch):
    monkeypatch.setattr("diffsal.protocol.results.draw", lambda *_: [])


def test_the_table_command_prints_every_format(done, nothing_drawn):
    invoke = CliRunner().invoke
    for form in ("text", "markdown", "latex", "csv", "json"):
        result = invoke(main, ["protocol", "table", str(done), "--format", form])
        assert result.exit_code == 0, result.output
        assert "contrast" in result.stdout
    assert json.loads(result.stdout)[0]["name"] == "overall"


def test_the_table_command_draws(done):
    result = CliRunner().invoke(main, ["protocol", "table", str(done)])
    for name in ("tiles-auroc.png", "tiles-figure-1.png"):
        path = done / "plots" / name
        assert str(path) in result.stderr
        assert Image.open(path).size[0] > 600


def test_tables_are_printed_where_no_plot_can_be(done, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(done, out, ignore=shutil.ignore_patterns("cache", "plots"))
    (out / "plots").write_text("in the way", "utf-8")
    result = CliRunner().invoke(main, ["protocol", "table", str(out)])
    assert result.exit_code == 0
    assert "Note: no plots" in result.stderr
    assert "contrast" in result.stdout


def test_the_table_command_needs_a_baseline_that_is_there(done, nothing_drawn):
    result = CliRunner().invoke(main, ["protocol", "table", str(done)])
    assert result.exit_code == 0
    result = CliRunner().invoke(main, ["protocol", "table", str(done), "--baseline", "contrast"])
    assert result.exit_code == 0
    result = CliRunner().invoke(main, ["protocol", "table", str(done), "--baseline", "x"])
    assert result.exit_code == 1
    assert "no method 'x'" in result.stderr
