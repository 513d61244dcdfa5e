"""Which images the report shows."""

import numpy as np


def test_gallery_shows_what_it_says(audited):
    table = audited.table
    shown = {group["id"]: group["images"] for group in audited.json["gallery"]}
    by_share = np.argsort(-table["common_mode_share"])[:3]
    assert shown["common-mode"] == [table["path"][position] for position in by_share]
    by_faith = np.argsort(table["occlusion_difference"])[:3]
    assert shown["unfaithful"] == [table["path"][position] for position in by_faith]
    wrong = dict(zip(table["path"], table["correct"], strict=True))
    assert shown["wrong"]
    assert not any(wrong[path] for path in shown["wrong"])
    assert all(wrong[path] for path in shown["typical"])
    assert (
        audited.page.count("data:image/png;base64,") == 5 * sum(map(len, shown.values())) + 15 + 9
    )
