"""A small LibreOffice help in the format of the real one, for tests of translation."""

from pathlib import Path

PAGE = """<!DOCTYPE html>
<html lang="{language}" dir="ltr"><head><title>{title}</title></head>
<body><p dir="auto">LibreOffice Help</p><div id="DisplayArea">
    <h1 id="hd_id1" dir="auto">
<a name="top"></a>{title}</h1>
{paragraphs}
</div></body></html>
"""
WORDS = {"file": "Datei", "page": "Seite", "cell": "Zelle", "table": "Tabelle", "line": "Linie", "font": "Schrift"}
VERBS = {"Opens": "Öffnet", "Closes": "Schließt", "Deletes": "Löscht", "Saves": "Speichert"}


def write_help(folder: Path, pages: int = 12) -> Path:
    """Folders en-US and de below `folder`, with every sentence of VERBS and WORDS somewhere."""
    sentences = [
        (f'{verb} the <span class="input">{word}</span> &amp; more.', f"{ours} die {theirs}\n &amp; mehr.")
        for verb, ours in VERBS.items()
        for word, theirs in WORDS.items()
    ]
    for number in range(pages):
        chosen = [*sentences[number::pages], ("Click OK.", "Klicken Sie auf OK."), ("LibreOffice", "LibreOffice")]
        titles = (f"Chapter {number}", f"Kapitel {number}")
        for side, language in enumerate(("en-US", "de")):
            lines = [
                f'<p id="par_id{number}{place}" class="paragraph" dir="auto">{pair[side]}</p>'
                for place, pair in enumerate(chosen)
            ]
            lines.append(f'<p id="par_only_{language}">{language}</p>')
            path = folder / language / "text" / f"page{number}.html"
            path.parent.mkdir(parents=True, exist_ok=True)
            text = PAGE.format(language=language, title=titles[side], paragraphs="\n".join(lines))
            path.write_text(text, encoding="utf-8")
    (folder / "en-US" / "text" / "untranslated.html").write_text(PAGE, encoding="utf-8")
    return folder
