"""The command that says which pages are older than the code that makes their figures."""

import json
import re

import pytest

from tests import figures

CODE = '''"""About ä."""

def area(width, height):
    """Returns the area."""
    return width * height  # in m²
'''


def test_words_and_layout_are_no_code():
    other = '"""Other words."""\ndef area(\n    width, height\n):\n    return width * height\n'
    code = "defarea(width,height):returnwidth*height"
    assert figures.code_of(CODE) == figures.code_of(other) == code
    assert figures.code_of(CODE) != figures.code_of(CODE.replace("*", "+")), "the control"


def test_a_page_is_older_once_its_code_changes(tmp_path, monkeypatch, capsys):
    """Until its figures are recorded as made again."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "area.py").write_text(CODE)
    (tmp_path / "record.json").write_text("{}")
    monkeypatch.setattr(figures, "SOURCES", {"page.md": ("code",), "other.md": ("code/area.py",)})
    monkeypatch.setattr(figures, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(figures.digest, "__defaults__", (tmp_path,))

    def run(*args):
        monkeypatch.setattr("sys.argv", ["figures", *args])
        return figures.main(), capsys.readouterr().out

    assert run("--made", "page.md")[0] == 0
    code, printed = run()
    assert code == 1 and re.search("never recorded +other.md", printed)
    assert re.search("of today's code +page.md", printed)
    run("--made", "other.md")
    assert run()[0] == 0
    (tmp_path / "code" / "area.py").write_text(CODE.replace("*", "+"))
    assert run()[1].endswith(
        "2 pages: 0 of today's code, 2 older than the code, 0 never recorded\n"
    )
    with pytest.raises(SystemExit):
        run("--made", "elsewhere.md")


def test_every_page_that_was_measured_is_listed():
    measured = {
        path.relative_to(figures.ROOT).as_posix()
        for path in (figures.ROOT / "train").rglob("*.md")
        if re.search(r"^Measured on \d{4}-", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    notebooks = {f"notebooks/{path.name}" for path in (figures.ROOT / "notebooks").glob("*.ipynb")}
    assert len(measured) >= 15 and measured | notebooks <= figures.SOURCES.keys()
    assert json.loads(figures.RECORD.read_text()).keys() <= figures.SOURCES.keys()
    code = {name for names in figures.SOURCES.values() for name in names}
    assert [name for name in code if not (figures.ROOT / name).exists()] == []
    assert figures.digest("train/memory.md"), "and is read"
