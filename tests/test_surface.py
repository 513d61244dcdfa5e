"""The public surface changes when somebody means it to."""

import json
import runpy
from pathlib import Path

SCRIPT = Path(__file__).with_name("surface.py")


def test_the_public_surface_is_the_stored_one(few_draws: None) -> None:
    module = runpy.run_path(str(SCRIPT))
    now = json.loads(json.dumps(module["surface"]()))
    stored = json.loads(module["STORED"].read_text("utf-8"))
    for part in stored:
        assert now[part] == stored[part], f"{part} changed: run `make surface` if it is meant"
    assert now.keys() == stored.keys()
