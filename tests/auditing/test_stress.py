"""What the stress test does to maps and predictions."""

import numpy as np


def test_stress_test_changes_maps_and_no_prediction(audited):
    table, finding = audited.table, audited.findings["stress-test"]
    measured = ~np.isnan(table["target_after"])
    assert measured.sum() == 10  # the other half made the vector
    assert table["prediction_changed"][measured].sum() == 0
    assert "None of their predictions changed" in finding["says"]
    assert np.nanmax(table["probability_change"]) < 1e-5
    assert np.nanmax(table["difference_change"]) < 1e-4
    assert np.nanmean(table["target_after"]) < np.nanmean(table["target_before"])
    assert np.nanmean(table["share_after"]) > np.nanmean(table["common_mode_share"])
