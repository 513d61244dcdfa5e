import json
import os
import signal
import subprocess
import sys

import pytest
from serving.site import asking

from diffsal import DiffsalError, load_model, save_checkpoint
from diffsal.models.architectures import build_model
from diffsal.serving.run import serve

SHAPE = {"growth_rate": 4, "block_config": (1, 1), "num_init_features": 8, "num_classes": 2}


@pytest.mark.skipif(os.name == "nt", reason="interrupts are sent otherwise there")
def test_from_the_command_to_an_answer_to_its_end(tmp_path, png) -> None:
    architecture = "torchvision:DenseNet"
    model = build_model(architecture, SHAPE).eval()
    save_checkpoint(
        tmp_path / "net.pt", model, architecture=architecture, arguments=SHAPE, classes=("a", "b")
    )
    command = [sys.executable, "-m", "diffsal", "serve", "--model", "net.pt", "--port", "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as running:
        try:
            url = running.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:")
            about = json.loads(asking(f"{url}/model")[2])
            assert (about["title"], about["local"]) == ("net.pt", True)
            before = set(tmp_path.rglob("*"))
            image = json.loads(asking(f"{url}/images", png())[2])["image"]
            told = json.loads(asking(f"{url}/explain", json.dumps({"image": image}).encode())[2])
            assert told["classes"] == ["a", "b"]
            assert set(tmp_path.rglob("*")) == before
            running.send_signal(signal.SIGINT)
            rest, errors = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 0
    assert rest == ""
    assert "Traceback" not in errors


def test_no_input_is_made_by_guessing(tmp_path) -> None:
    architecture, path = "torchvision:DenseNet", tmp_path / "net.pt"
    model = build_model(architecture, SHAPE)
    save_checkpoint(path, model, architecture=architecture, arguments=SHAPE)
    with pytest.raises(DiffsalError, match="how images become the model's input"):
        serve(load_model(path), device="cpu", port=0)
