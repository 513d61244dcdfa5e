"""Messages with names from files in them: one line, of sane length, with nothing that acts."""

from diffsal.errors import DiffsalError


def test_what_acts_on_terminals_is_escaped() -> None:
    said = str(DiffsalError("a\nNote: b\x1b[2J\a\u202e\udcff é 猫: is no image; replace it"))
    assert said == r"a\nNote: b\x1b[2J\x07\u202e\udcff é 猫: is no image; replace it"


def test_endless_messages_keep_both_ends() -> None:
    said = str(DiffsalError(f"where: {'x' * 10**6}: what to do"))
    assert len(said) == 2_000
    assert said.startswith("where: xxx")
    assert said.endswith("x: what to do")
