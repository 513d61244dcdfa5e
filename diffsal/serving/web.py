"""The web server: a page, and answers to what it asks. Nothing is fetched from elsewhere."""

import json
import logging
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from diffsal import __version__
from diffsal.errors import DiffsalError
from diffsal.serving.requests import LARGEST_FILE, Desk, is_from_here, is_local, too_large
from diffsal.serving.shelf import GoneError
from diffsal.serving.shifting import TARGETS

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise DiffsalError(
        "the page needs starlette and uvicorn: pip install 'diffsal[serve]'"
    ) from error

PORT = 7860
"""Where the page is, unless told."""

_PAGE = Path(__file__).parent / "page"
_FILES = {
    "/": "index.html",
    **{f"/{name}": name for name in ("page.css", "page.js", "map.js", "parts.js")},
}
_HEADERS = {
    # The browser itself refuses whatever is not of this server.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
_LARGEST_QUESTION = 10_000  # bytes

Answer = Callable[[Request], Any]


def application(desk: Desk, host: str, title: str, examples: Sequence[Path] = ()) -> Starlette:
    """The web application.

    Args:
        desk: answers.
        host: what the server listens on.
        title: of the model, on the page.
        examples: images that are offered to those who have none at hand.
    """
    about = {
        "title": title,
        "version": __version__,
        "largest_file": LARGEST_FILE,
        "targets": TARGETS,
        "local": is_local(host),
        "examples": [path.name for path in examples],
    }

    async def model(_request: Request) -> Response:
        return JSONResponse(about)

    async def take(request: Request) -> Response:
        content = await _body(request, LARGEST_FILE, too_large())
        name = unquote(request.headers.get("x-name", ""))
        return JSONResponse(await run_in_threadpool(desk.take, content, name))

    async def figure(request: Request) -> Response:
        asked = {
            name: int(value) if value.isdecimal() else value
            for name, value in request.query_params.items()
        }
        asked["image"] = request.query_params.get("image", "")
        png = await run_in_threadpool(desk.figure, asked)
        return Response(png, media_type="image/png")

    async def example(request: Request) -> Response:
        return FileResponse(examples[request.path_params["number"] % len(examples)])

    routes = [
        *(Route(path, guarded(host, partial(_file, name))) for path, name in _FILES.items()),
        Route("/model", guarded(host, model)),
        Route("/images", guarded(host, take), methods=["POST"]),
        Route("/figure.png", guarded(host, figure)),
        *(
            Route(f"/{name}", guarded(host, partial(_answer, answer)), methods=["POST"])
            for name, answer in desk.answers().items()
        ),
    ]
    if examples:
        routes.append(Route("/examples/{number:int}", guarded(host, example)))
    return Starlette(routes=routes)


async def _file(name: str, _request: Request) -> Response:
    return FileResponse(_PAGE / name)


async def _answer(answer: Callable[[dict[str, Any]], Any], request: Request) -> Response:
    excess = DiffsalError(f"the question is longer than {_LARGEST_QUESTION} bytes")
    text = await _body(request, _LARGEST_QUESTION, excess)
    try:
        asked = json.loads(text)
    except (ValueError, RecursionError):  # of thousands of brackets
        asked = None
    if not isinstance(asked, dict):
        raise DiffsalError("the question is no JSON object")
    return JSONResponse(await run_in_threadpool(answer, asked))


async def _body(request: Request, most: int, excess: DiffsalError) -> bytes:
    """What was sent, given up as soon as it is too much."""
    if int(request.headers.get("content-length") or 0) > most:
        raise excess
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise excess
    return bytes(content)


def guarded(host: str, answer: Answer) -> Answer:
    """An endpoint that tells in one line what went wrong, and answers to its own page alone."""

    async def guard(request: Request) -> Response:
        if not is_from_here(host, dict(request.headers)):
            return _refusal(403, "only this server's own page is answered")
        try:
            response: Response = await answer(request)
        except GoneError as error:
            return _refusal(410, str(error))
        except DiffsalError as error:
            return _refusal(422, str(error))
        except Exception:
            logging.getLogger(__name__).exception("%s", request.url.path)
            return _refusal(500, "something went wrong here: the terminal tells what")
        response.headers.update(_HEADERS)
        return response

    return guard


def _refusal(status: int, error: str) -> Response:
    return JSONResponse({"error": error}, status, _HEADERS)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0: any that is free.

    Raises:
        DiffsalError: the port is taken, or the host is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DiffsalError(
            f"cannot listen on {host}, port {port} ({reason}): pass another --port or --host"
        ) from error


def address(listening: socket.socket) -> str:
    """Where a browser finds what listens.

    Example:
        >>> with listen("127.0.0.1", 0) as listening:
        ...     address(listening)[:17]
        'http://127.0.0.1:'
    """
    host, port = listening.getsockname()[:2]
    name = f"[{host}]" if ":" in host else quote(host)
    return f"http://{name}:{port}"


def server(app: Starlette) -> uvicorn.Server:
    """What serves an application; ``server(app).run([listening])`` does so until interrupted."""
    return uvicorn.Server(
        uvicorn.Config(app, log_level="warning", lifespan="off", access_log=False)
    )
