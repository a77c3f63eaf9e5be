"""Folders and files appear at once and whole, or not at all; what others wrote stays."""

from pathlib import Path

import pytest

from archscan.errors import BadInput
from archscan.folders import beside, check_place, check_replaceable, replacing, write_whole


def test_a_replaced_folder_holds_only_what_was_written_last(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    for name in ("first", "second"):
        with replacing(target) as partial:
            (partial / name).write_text(name)
        assert [path.name for path in target.iterdir()] == [name]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("context", [beside, replacing])
def test_after_an_error_all_is_as_before(context, error, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()

    def write() -> None:
        with context(target) as partial:
            (partial / "new").touch()
            raise error

    with pytest.raises((KeyboardInterrupt, BadInput)) as caught:
        write()
    assert isinstance(caught.value, KeyboardInterrupt) or "No space left" in str(caught.value)
    assert list(tmp_path.rglob("*")) == [target, target / "old"]


def test_only_known_files_may_be_lost(tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert check_replaceable(target, (), "which nobody wrote") == target
    target.mkdir()
    (target / "plan.json").touch()
    with pytest.raises(BadInput, match="--overwrite"):
        check_replaceable(target, ("plan.json",), "which nobody wrote")
    check_replaceable(target, ("plan.json",), "which nobody wrote", overwrite=True)
    with pytest.raises(BadInput, match=r"holds plan\.json, which nobody wrote"):
        check_replaceable(target, (), "which nobody wrote", overwrite=True)
    with pytest.raises(BadInput, match="is a file"):
        check_place(target / "plan.json", target.parents)
    (target / "plan.json").chmod(0o755)
    with pytest.raises(BadInput, match=r"plan\.json is not a folder"):
        check_place(target / "plan.json" / "out", (target / "plan.json",))


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summary.json"
    write_whole(file, "old")
    write_whole(file, "new")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(BadInput, match="No space left"):
        write_whole(file, "newer")
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]
