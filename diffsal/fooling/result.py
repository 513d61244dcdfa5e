"""A fooled model, with what became of decisions and maps, and its file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from diffsal.errors import DiffsalError
from diffsal.models.checkpoints import save_checkpoint


@dataclass(frozen=True, repr=False)
class Fooled:
    """What an attack made; :func:`diffsal.fool` gives one, and printed it is a table.

    Attributes:
        model: a copy of the honest one whose maps lie; float32, in evaluation mode.
        report: plain JSON types: ``method``, ``objective``, ``target``; ``measure``, the name of
            the objective's in :data:`diffsal.fooling.objectives.MEASURES`; ``images``, how many it
            was measured on; ``honest`` and ``fooled``, each with ``auroc``, ``accuracy``, means
            over the images of the ``measure`` of the ``true``, ``false`` and ``difference`` map,
            and of their ``common_mode_share`` (``None`` for one logit), and ``composite_skill`` of
            the difference map on at most 30 of the images of each class (``None`` where it is
            undefined, see :func:`diffsal.fooling.skill.composite_skills`); ``agreement``, the share
            of equal predictions; and ``largest_probability_change``.
        description: what a checkpoint says of the model, as arguments of
            :func:`diffsal.save_checkpoint`; ``architecture`` and ``arguments`` of them only where
            the honest model came of a file.
    """

    model: nn.Module
    report: dict[str, Any]
    description: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write a checkpoint, for ``diffsal.load_model`` and ``diffsal explain --model``.

        Raises:
            DiffsalError: the honest model was in memory alone, so that nobody knows how to build
                it anew; a place that cannot be written to.
        """
        if "architecture" not in self.description:
            raise DiffsalError(
                f"{path}: how a {type(self.model).__name__} is built is not known: call "
                "diffsal.save_checkpoint(path, fooled.model, architecture=..., arguments=..., "
                "**fooled.description)"
            )
        save_checkpoint(path, self.model, **self.description)

    def __repr__(self) -> str:
        return as_table(self.report)


def as_table(report: Mapping[str, Any]) -> str:
    """What became of decisions and maps, for people to read.

    Args:
        report: see :class:`Fooled`.

    Example:
        >>> maps = dict.fromkeys(("true", "false", "difference", "common_mode_share"), 0.4)
        >>> honest = {"auroc": 0.9, "accuracy": 0.8, "composite_skill": None, **maps}
        >>> fooled = honest | {"true": 0.1}
        >>> report = {"measure": "target_distance", "honest": honest, "fooled": fooled}
        >>> report |= {"agreement": 1.0, "largest_probability_change": 1e-7}
        >>> print(as_table(report).splitlines()[4])
        true map, target distance            0.4000   0.1000
    """
    measure = report["measure"].replace("_", " ")
    names = {
        "auroc": "AUROC",
        "accuracy": "accuracy",
        "common_mode_share": "common-mode share",
        **{map_: f"{map_} map, {measure}" for map_ in ("true", "false", "difference")},
        "composite_skill": "difference map, composite skill",
    }
    trained = "control" if report.get("objective") == "control" else "fooled"
    lines = [f"{'':34}{'honest':>9}{trained:>9}"]
    for key, name in names.items():
        pair = [report[model][key] for model in ("honest", "fooled")]
        lines.append(
            f"{name:34}" + "".join("        -" if x is None else f"{x:9.4f}" for x in pair)
        )
    return "\n".join(
        [
            *lines,
            f"{'agreement of predictions':43}{report['agreement']:9.4f}",
            f"{'largest change of a probability':43}{report['largest_probability_change']:9.2g}",
        ]
    )
