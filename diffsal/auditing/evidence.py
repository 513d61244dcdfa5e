"""Everything that an audit measures, before it is put into words and files."""

from dataclasses import dataclass, replace

from diffsal.auditing.batches import draw_samples
from diffsal.auditing.clusters import Kinds, evidence_kinds
from diffsal.auditing.composites import CompositeTest, composite_test
from diffsal.auditing.measure import measure_samples
from diffsal.auditing.rows import Measured
from diffsal.auditing.settings import Settings
from diffsal.auditing.slow import measure_likewise, measure_slowly
from diffsal.auditing.stability import Reestimated, measure_reestimated
from diffsal.auditing.stress import stress_test
from diffsal.data.index import Index, Sample
from diffsal.errors import DiffsalError
from diffsal.models.checkpoints import LoadedModel, check_class_order
from diffsal.system.devices import running
from diffsal.system.processes import check_alike


@dataclass(frozen=True)
class Evidence:
    """What was measured of a model, and of a reference where there is one.

    Attributes:
        index: where the images are from.
        loaded: the model.
        reference: the model beside it.
        settings: see there.
        split: ``test`` or ``all``, the part of the index that was audited.
        measured: the model's numbers.
        other: the reference's.
        composites: the composite test; or why it could not be run.
        other_composites: the reference's.
        kinds: kinds of evidence; or why there are none to tell.
        reestimated: the model with other batch-norm statistics; or why it could not be had.
        fooled: the stress test's copy; ``None`` where it could not be applied.
        obstacle: why; empty where it was.
    """

    index: Index
    loaded: LoadedModel
    reference: LoadedModel | None
    settings: Settings
    split: str
    measured: Measured
    other: Measured | None
    composites: CompositeTest | str
    other_composites: CompositeTest | str
    kinds: Kinds | str
    reestimated: Reestimated | str
    fooled: LoadedModel | None
    obstacle: str


def gather(
    index: Index, loaded: LoadedModel, settings: Settings, reference: LoadedModel | None
) -> Evidence:
    """Measure; arguments and errors are those of :func:`diffsal.auditing.run.audit`."""
    for model in (loaded, reference):
        if model is not None:
            check_class_order(model, index.classes, index.source)
    samples, split = _chosen(index, settings)
    measured = measure_samples(samples, index, loaded, settings, "audit")
    _check_alike(measured, settings)
    with running(settings.device, settings.preprocessing.size, settings.batch_size):
        measure_slowly(measured, loaded, settings)
        composites = composite_test(measured, loaded, settings)
        kinds = evidence_kinds(measured)
        reestimated = measure_reestimated(measured, loaded, settings)
        fooled, obstacle = stress_test(index, split, measured, loaded, settings)
    other: Measured | None = None
    other_composites: CompositeTest | str = "there is no reference"
    if reference is not None:
        own = reference.preprocessing or replace(settings.preprocessing, channels=3)
        likewise = replace(settings, preprocessing=own)
        other = measure_samples(samples, index, reference, likewise, "reference")
        _check_alike(other, settings)
        with running(settings.device, own.size, settings.batch_size):
            measure_likewise(other, measured, reference, likewise)
            other_composites = composite_test(other, reference, likewise)
    return Evidence(
        index,
        loaded,
        reference,
        settings,
        split,
        measured,
        other,
        composites,
        other_composites,
        kinds,
        reestimated,
        fooled,
        obstacle,
    )


def _check_alike(measured: Measured, settings: Settings) -> None:
    """Of which images tests draw, in processes that share them."""
    seen = [(str(sample.path), sample.label) for sample in measured.samples]
    check_alike(seen, settings.share[1], "images that could be read and explained")


def _chosen(index: Index, settings: Settings) -> tuple[list[Sample], str]:
    """The samples to audit, in the index's order, and the split that they are of."""
    samples, split = list(index.split("test")), "test"
    if not samples:
        samples, split = list(index.samples), "all"
    if not samples:
        raise DiffsalError(f"{index.source}: the index holds no images; list some")
    return draw_samples(samples, settings.limit, settings.seed), split
