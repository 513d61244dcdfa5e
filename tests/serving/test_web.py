import json
import re
import socket
from pathlib import Path

import pytest
from serving.site import asking, error_of, serving

from diffsal.serving import web
from diffsal.serving.requests import Desk
from diffsal.serving.web import listen


@pytest.fixture
def desk(served):
    return Desk(served())


@pytest.fixture
def site(desk):
    with serving(desk) as url:
        yield url


def test_an_image_is_given_and_explained(site, desk, png) -> None:
    status, _, content = asking(f"{site}/images", png(), X_Name="a%20b.png")
    image = json.loads(content)["image"]
    assert status == 200
    question = json.dumps({"image": image, "true": 1}).encode()
    told = json.loads(asking(f"{site}/explain", question)[2])
    assert told == desk.explain({"image": image, "true": 1})
    assert told["path"] == "a b.png"
    status, headers, content = asking(f"{site}/figure.png?image={image}&true=1&false=0")
    assert (status, headers["content-type"], content[1:4]) == (200, "image/png", b"PNG")


@pytest.mark.parametrize("path", ["/", "/page.css", "/page.js", "/map.js", "/parts.js", "/model"])
def test_nothing_may_be_fetched_from_elsewhere(site, path) -> None:
    status, headers, content = asking(site + path)
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
    addresses = set(re.findall(r"(?:https?:)?//[a-z][^\s'\"%]+", content.decode()))
    assert {one for one in addresses if not one.startswith("http://www.w3.org/2000/svg")} == set()


def test_every_file_of_the_page_is_served(site) -> None:
    folder = Path(web.__file__).parent / "page"
    for file in folder.iterdir():
        path = "" if file.name == "index.html" else file.name
        assert asking(f"{site}/{path}")[2] == file.read_bytes()


@pytest.mark.parametrize("path", ["/../web.py", "/page/index.html", "/examples/0", "/docs"])
def test_nothing_else_is_served(site, path) -> None:
    assert asking(site + path)[0] == 404


def test_a_bad_file_is_one_line(site) -> None:
    status, _, content = asking(f"{site}/images", b"hello", X_Name="notes.txt")
    assert status == 422
    assert error_of(content).startswith("notes.txt: not a readable image")


def test_a_file_that_is_too_large_is_given_up(site, monkeypatch) -> None:
    monkeypatch.setattr(web, "LARGEST_FILE", 1_000)
    status, _, content = asking(f"{site}/images", bytes(1_001))
    assert status == 422
    assert "larger than" in error_of(content)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"1", b"[" * 9_000])
def test_what_is_no_question_is_refused(site, body) -> None:
    status, _, content = asking(f"{site}/explain", body)
    assert status == 422
    assert error_of(content) == "the question is no JSON object"


def test_a_question_that_is_too_long_is_given_up(site) -> None:
    status, _, content = asking(f"{site}/explain", b" " * 10_001)
    assert (status, error_of(content)) == (422, "the question is longer than 10000 bytes")


def test_an_image_that_is_gone_is_asked_for_again(site) -> None:
    status, _, content = asking(f"{site}/lie", b'{"image": "x", "strength": 0}')
    assert status == 410
    assert "drop it once more" in error_of(content)


@pytest.mark.parametrize(
    "headers", [{"Host": "rebound.example"}, {"Origin": "https://elsewhere.example"}]
)
def test_other_sites_are_refused(site, headers) -> None:
    for path in ("/", "/model", "/figure.png"):
        assert asking(site + path, **headers)[0] == 403
    assert asking(f"{site}/images", b"x", **headers)[0] == 403


def test_a_fault_of_ours_shows_no_traceback(site, monkeypatch, caplog) -> None:
    monkeypatch.setattr(web.json, "loads", lambda _: 1 / 0)
    status, _, content = asking(f"{site}/explain", b"{}")
    monkeypatch.undo()
    assert status == 500
    assert error_of(content) == "something went wrong here: the terminal tells what"
    assert "ZeroDivisionError" in caplog.text


def test_examples_are_served(desk, png, tmp_path) -> None:
    (tmp_path / "one.png").write_bytes(png())
    with serving(desk, examples=[tmp_path / "one.png"]) as url:
        assert json.loads(asking(f"{url}/model")[2])["examples"] == ["one.png"]
        assert asking(f"{url}/examples/0")[2] == png()


def test_only_this_machine_is_listened_to(site) -> None:
    port = int(site.rpartition(":")[2])
    own = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for host in own - {"127.0.0.1", "127.0.1.1"}:
        with socket.socket() as other:
            other.settimeout(1)
            assert other.connect_ex((host, port)) != 0


def test_a_port_that_is_taken_is_one_line(refused) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with refused(rf"cannot listen on 127\.0\.0\.1, port {port} .*--port"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", ""])
def test_a_host_that_is_not_here_is_one_line(refused, host) -> None:
    if host:
        with refused("cannot listen on"):
            listen(host, 0)
    else:  # all addresses, as sockets have it
        listen(host, 0).close()
