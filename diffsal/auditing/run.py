"""Audit one model's files: can its heatmaps be believed? Numbers, intervals, and what they do not
show.

Every image is measured once with each method; a row of numbers is kept for each, no pictures. From
the rows come the findings, see :mod:`diffsal.auditing.findings`, and the files that
``docs/audit.md`` documents."""

from pathlib import Path
from typing import Any

import torch

from diffsal import __version__
from diffsal.auditing.evidence import gather
from diffsal.auditing.log import log_file
from diffsal.auditing.result import Audit, check_free
from diffsal.auditing.settings import Settings
from diffsal.data.index import Index
from diffsal.models.checkpoints import LoadedModel
from diffsal.system.locks import sole_writer
from diffsal.system.processes import process_group
from diffsal.system.progress import LOG, logged


def audit(
    index: Index,
    loaded: LoadedModel,
    folder: Path,
    settings: Settings,
    reference: LoadedModel | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Audit a model and write ``per-image.csv``, ``audit.json`` and ``report.html``.

    The test split is audited if the index has one, else all of its images. Labels are taken as
    true. An image that cannot be read does not stop the rest. The files are written when everything
    is known, the report last; each appears whole or not at all. ``audit.log`` is there from the
    beginning, and tells how far it is.

    Args:
        index: read with the model's class names where these are known; else its own are taken to
            be in the order of the outputs.
        loaded: the model; it is moved to the settings' device; on a CPU its weights are laid out
            channels last where that changes no more than rounding.
        folder: made where it is not there.
        settings: see there.
        reference: a second model, measured on the same images and set beside the first.
        overwrite: replace files that are there already; an earlier audit's rows of a reference go
            where there is none now.

    Returns:
        The content of ``audit.json``. Of processes that share the work the first writes and tells;
        the others' is empty.

    Raises:
        DiffsalError: no images, none that can be read, class names that do not fit a model's
            outputs or their order, a model that does not run on the images, files that are there
            already, another run that is writing to the folder.
    """
    check_free(folder, overwrite)
    with process_group(torch.device("cpu"), settings.share) as is_first:
        if not is_first:
            gather(index, loaded, settings, reference)
            return {}
        with sole_writer(folder), logged(log_file(folder)):
            LOG.info("audit of %s on %s by diffsal %s", loaded.path, index.source, __version__)
            found = Audit(gather(index, loaded, settings, reference))
            found.save(folder, overwrite)
            LOG.info("written: %s", folder / "report.html")
    return found.document
