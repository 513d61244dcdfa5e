"""Which images the report shows."""

import numpy as np


def test_gallery_shows_what_it_says(audited):
    table = audited.table
    shown = {group["id"]: group["images"] for group in audited.json["gallery"]}

    def lowest(values):
        labels = np.array(table["label"])
        orders = (np.argsort(np.where(labels == name, values, np.inf)) for name in ("3", "8"))
        return [table["path"][position] for order in orders for position in order[:2]]

    assert shown["common-mode"] == lowest(-table["common_mode_share"])
    assert shown["unfaithful"] == lowest(table["occlusion_difference"])
    wrong = dict(zip(table["path"], table["correct"], strict=True))
    assert shown["wrong"]
    assert not any(wrong[path] for path in shown["wrong"])
    assert all(wrong[path] for path in shown["typical"])
    kinds = audited.json["clusters"]["kinds"]
    of_kinds = sum(1 + len(one["examples"]) for one in kinds)
    pictures = 5 * sum(map(len, shown.values())) + 15 + 9 + of_kinds
    assert audited.page.count("data:image/png;base64,") == pictures
