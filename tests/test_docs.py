"""README, docs/ and CONTRIBUTING: code blocks run, links lead somewhere, sentences are short,
README is two minutes long."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = ("# vllm", "# gpu")
"""The first line of a block that wants what is not here; it is only compiled."""
WORDS = 35


def names(paths):
    return [path.relative_to(ROOT).as_posix() for path in paths]


def blocks(text):
    """The Python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


WITH_CODE = [path for path in DOCS if blocks(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", WITH_CODE, ids=names(WITH_CODE))
def test_code_runs_as_it_stands(path, tmp_path, monkeypatch):
    """The blocks of a page one after the other, as pasted into one session in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    session = {"__name__": "__main__"}
    for i, block in enumerate(blocks(path.read_text(encoding="utf-8"))):
        code = compile(block, f"{path.name}, block {i + 1}", "exec")
        missing = "BitsAndBytesConfig" in block and not find_spec("bitsandbytes")
        if not block.startswith(ELSEWHERE) and not missing:
            needed = re.findall(r"^(?:import|from) (peft|transformers)\b", block, re.MULTILINE)
            for package in needed + ["triton"] * ('use_backend("triton"' in block):
                pytest.importorskip(package)
            exec(code, session)


def test_pages_with_code_are_found():
    assert {"README.md", "docs/training.md", "docs/serving.md", "docs/proof.md", "docs/vllm.md"} <= set(names(WITH_CODE))
    assert blocks("```python\na\n```\nb\n```bash\nc\n```\n```python\nd\n```\n") == ["a\n", "d\n"]


def anchors(text):
    """The places of a page that a link may name."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=names(DOCS))
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        assert not link.startswith("http"), f"{link}: readers may have no network"
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{path.name}: {link}"
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{path.name}: {link}"


def sentences(text):
    """The sentences of a page's prose: without code, formulas and tables that a program wrote. A
    cell of a table, a point of a list and a heading end one."""
    text = re.sub(r"^<!-- bench:begin -->.*?^<!-- bench:end -->", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(?: {4}.*\n)+", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`\n]+`", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^(?=#|\* |\d+\. |- )", "\n", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\||(?<=\|)\n", text):
        yield from re.split(r"(?<=[.!?])[\"”’*)]*\s+(?=\S)", " ".join(paragraph.split()))


def words(sentence):
    return [word for word in sentence.split() if re.search(r"\w", word)]


@pytest.mark.parametrize("path", DOCS, ids=names(DOCS))
def test_sentences_are_short(path):
    found = [s for s in sentences(path.read_text(encoding="utf-8")) if len(words(s)) > WORDS]
    assert not found, "\n".join(f"{len(words(s))} words: {s}" for s in found)


def test_how_sentences_are_counted():
    text = "# A head\n\nOne two. Three `four five` six\nseven!\n\n* a point\n* another\n\n"
    text += "| a cell | b |\n|---|---|\n\n    no = prose\n\nEnd."
    assert [len(words(s)) for s in sentences(text) if words(s)] == [2, 2, 4, 2, 1, 2, 1, 1]
    assert max(len(words(s)) for s in sentences("word " * 36 + ".")) == 36


def test_readme_is_read_in_two_minutes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert "docs/glossary.md" in text and "docs/glossary.md" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_glossary_defines_each_word_once():
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    terms = [term.strip("`") for row, _ in rows for term in row.split(", ") if row not in ("symbol", "word", "---")]
    assert len(terms) == len(set(terms)), sorted(t for t in terms if terms.count(t) > 1)
    wanted = "h P gain F1 F2 B1 B2 B3 page slot gate plan site budget split-K epilogue".split()
    assert set(wanted) <= set(terms), set(wanted) - set(terms)


FOLDERS = ("bench/", "csrc/", "docs/", "examples/", "lora_kernels/", "tests/")


@pytest.mark.parametrize("path", DOCS, ids=names(DOCS))
def test_paths_in_the_text_exist(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for name in re.findall(r"`((?:" + "|".join(FOLDERS) + r")[\w./*-]*)`", text):
        assert any(ROOT.glob(name.rstrip("/"))), f"{path.name}: {name} is not there"
