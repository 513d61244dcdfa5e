"""From a model to a page that is served."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from diffsal.data.preprocessing import Preprocessing
from diffsal.explaining.explanations import settings_of
from diffsal.models.checkpoints import LoadedModel
from diffsal.serving.explained import Served
from diffsal.serving.requests import Desk
from diffsal.serving.web import PORT, address, application, listen, server


def serve(
    loaded: LoadedModel,
    preprocessing: Preprocessing | None = None,
    *,
    classes: Sequence[str] | None = None,
    device: str = "auto",
    host: str = "127.0.0.1",
    port: int = PORT,
    examples: Sequence[Path] = (),
    ready: Callable[[str], object] = print,
) -> None:
    """Serve a page to play with a model, until interrupted.

    Args:
        loaded: the model; it is moved to the device.
        preprocessing: from an image's pixels to its input; ``None``: what its file says.
        classes: one name per class; ``None``: what its file says.
        device: see :func:`diffsal.system.devices.choose_device`.
        host: to listen on; by default other machines cannot reach it.
        port: 0: any that is free.
        examples: images that are offered to visitors who have none at hand.
        ready: called with the page's address once it answers.

    Raises:
        DiffsalError: the port is taken, no such device, no layer for maps; the file does not tell
            how images become the model's input, and nor does the caller.

    Example:
        ::

            serve(load_model("weights.pt"))
    """
    told = {"preprocessing": preprocessing, "classes": classes}
    known = settings_of(loaded, device, **{name: one for name, one in told.items() if one})
    layer = loaded.target_layer  # one that is missing is told at once
    model = loaded.model.to(known.device)
    served = Served(model, layer, known.preprocessing, known.device, known.classes)
    app = application(Desk(served), host, loaded.path.name, examples)
    with listen(host, port) as listening:
        ready(address(listening))
        with suppress(KeyboardInterrupt):
            server(app).run([listening])
