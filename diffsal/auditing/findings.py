"""What an audit's rows of numbers show, and what they do not, in words.

A finding is a few numbers with 95 % intervals, one plain sentence, and one on its limits.

The words stay within the evidence. There is no overall verdict: a low common-mode share does not
make a map faithful, and a faithful map does not make a model right."""

from diffsal.auditing.evidence import Evidence
from diffsal.auditing.findings_of_decisions import (
    find_batch_norm,
    find_performance,
    find_stress_test,
)
from diffsal.auditing.findings_of_inputs import (
    find_composites,
    find_input_level,
    find_occlusion,
    find_perturbation,
    find_sensitivity,
)
from diffsal.auditing.findings_of_maps import (
    find_agreement,
    find_clusters,
    find_common_mode,
    find_location,
    find_sanity,
)
from diffsal.auditing.wording import Finding


def find(evidence: Evidence) -> tuple[list[Finding], list[dict[str, str]]]:
    """The findings, in the order of the report, and what could not be found and why."""
    measured = evidence.measured
    left_out: dict[str, str] = {}
    findings = [
        find_composites(measured, evidence.composites, left_out),
        find_common_mode(measured),
        find_agreement(measured),
        find_occlusion(measured, left_out),
        find_input_level(measured),
        find_sensitivity(measured),
        find_location(measured, left_out),
        find_clusters(evidence.kinds, left_out),
        find_perturbation(measured, left_out),
        find_sanity(measured, left_out),
        find_performance(measured, left_out),
        find_batch_norm(measured, evidence.reestimated, left_out),
        find_stress_test(measured, evidence.obstacle, left_out),
    ]
    return findings, [{"what": what, "why": why} for what, why in left_out.items()]
