"""The documents are true: their code runs, their options and messages are those of the library."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import tomllib
import warnings
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
from messages import messages, said
from PIL import Image
from scripts import load
from tiny import LATENT, TEXT, model
from typer.main import get_command

import ras_compile
from ras_compile.cli.app import app
from ras_compile.config import RUNTIME_OPTIONS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.ipynb")])


def plain(text: str) -> str:
    return " ".join(text.replace("`", "").replace("\\", "").split())


def test_every_message_is_explained():
    """A kernel's message is found by the kernel's name, every other one by its first words."""
    page = plain((ROOT / "docs" / "troubleshooting.md").read_text())
    found = {message.place: message.words for message in messages()}
    assert len(found) > 100
    kernels = {place: words.split()[0] for place, words in found.items() if place.startswith("kernels/")}
    missing = {place: words for place, words in {**found, **kernels}.items() if plain(words) not in page}
    assert not missing, "docs/troubleshooting.md explains every message"


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs" / "reference.md").read_text()
    shown = re.findall(r"^::: ras_compile\.(\w+)$", text, re.MULTILINE)
    assert sorted(shown) == sorted(name for name in ras_compile.__all__ if name != "__version__")


@pytest.mark.parametrize("name", [name for name in ras_compile.__all__ if name != "__version__"])
def test_what_is_public_is_described(name):
    """Every argument of a public function or class, and of its public methods, stands in a docstring."""
    thing = getattr(ras_compile, name)
    own = (
        {name: part for name, part in vars(thing).items() if inspect.isfunction(part)} if inspect.isclass(thing) else {}
    )
    for part in [thing, *(part for name, part in own.items() if not name.startswith("_"))]:
        doc = inspect.getdoc(part) or ""
        given = (
            inspect.signature(part).parameters if not (inspect.isclass(part) and issubclass(part, Exception)) else {}
        )
        assert len(doc) > 20
        assert not [argument for argument in given if argument != "self" and not re.search(rf"\b{argument}\b", doc)], (
            part
        )


def test_the_tables_of_options_are_those_of_the_config():
    """Every option has a row, with its default; those that `configure` takes stand in the first table."""
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", (ROOT / "docs" / "options.md").read_text(), re.MULTILINE)
    defaults = {name: ast.literal_eval(default) for name, default in rows}
    assert len(defaults) == len(rows)
    assert defaults.pop("preset", 0) is None
    assert defaults == vars(ras_compile.RASConfig())
    assert [name for name, _ in rows[: len(RUNTIME_OPTIONS) + 1]] == [
        "preset",
        *(n for n in defaults if n in RUNTIME_OPTIONS),
    ]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("raise ConfigError(f'option {name} is new here')", "option \0 is new here"),
        ("def f():\n    text = 'one ' + f'{x}'\n    raise ValueError(text)", "one \0"),
        ("warn_once('ras_compile: hear hear')", "ras_compile: hear hear"),
    ],
)
def test_a_message_is_seen(source, text):
    assert text in [found for _, found in said(ast.parse(source))]


def as_page(path: Path) -> str:
    """A page as it is written, and a notebook as the page that it would be."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for kind, text in cells)


def test_notebooks_hold_no_output():
    """What they print is seen where they are run; here it would be large, and old."""
    for path in (page for page in PAGES if page.suffix == ".ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert cells and not any(cell["outputs"] or cell["execution_count"] for cell in cells)


def blocks(path: Path, *languages: str) -> list[tuple[int, str, str]]:
    """Line, code and language of the fenced blocks of a page; a visible line before one may except it, with its reason."""
    text = as_page(path)
    found = []
    for block in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        before = text[: block.start()].rstrip().rpartition("\n\n")[2]
        excepted = re.fullmatch(r"\*Not run by the tests: .{10,}\.\*", before.strip(), re.DOTALL)
        if block[1] in languages and not excepted:
            found.append((text[: block.start()].count("\n") + 1, block[2], block[1]))
    return found


def named(paths: list[Path]) -> dict:
    return {"argvalues": paths, "ids": [path.relative_to(ROOT).as_posix() for path in paths]}


class Weights:
    """In the place of weights that would be loaded: tiny pipelines of the same classes."""

    def __init__(self, tiny) -> None:
        self.tiny = tiny

    def make(self, name: str):
        makers = {
            "FluxKontextPipeline": self.tiny.editing,
            "WanPipeline": self.tiny.video,
            "StableAudioPipeline": self.tiny.audio,
        }
        return makers[name]() if name in makers else self.tiny.text_to_image(name)


@pytest.fixture
def code(monkeypatch, tmp_path):
    """Names that pages use without making them; nothing is compiled, loaded or sent to a device."""
    (tiny,) = load(["pipelines"], ["random_weights"])
    weights, attach, compile_ = Weights(tiny), ras_compile.attach, torch.compile

    def eagerly(model=None, *, backend=None, options=None, **given):
        if backend == "ras":
            options = {"inner_backend": "eager", **(options or {})}
        return compile_(model, backend=backend, options=options, **given)

    monkeypatch.setattr(
        ras_compile, "attach", lambda pipe, **options: attach(pipe, **{"inner_backend": "eager"} | options)
    )
    monkeypatch.setattr(torch, "compile", eagerly)
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"nothing was compiled", None))
    loader = classmethod(lambda cls, *args, **given: weights.make(cls.__name__))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", loader)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda pipe, *args: pipe)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), "teal").save("picture.png")
    Image.linear_gradient("L").resize((32, 32)).point(lambda value: 255 * (value > 127)).save("mask.png")
    latent, text = LATENT[:1], TEXT[:1]
    inputs = {"hidden_states": latent, "timestep": torch.ones(1), "text": text}
    names = {"ras_compile": ras_compile, "torch": torch, "pipe": weights.make("StableDiffusion3Pipeline")}
    names |= {
        "transformer": model(),
        "inputs": inputs,
        "latent": latent,
        "text": text,
        "nothing": torch.zeros_like(text),
    }
    yield names | {"times": torch.linspace(1, 0, 29)}
    for held in names.values():
        if isinstance(held, ras_compile.Handle):
            held.detach()


WITH_CODE = [path for path in PAGES if blocks(path, "python")]


@pytest.mark.pipelines
@pytest.mark.parametrize("path", **named(WITH_CODE))
def test_code_runs(path, code):
    """The blocks of a page one after another, as a reader would run them."""
    for line, source, _ in blocks(path, "python"):
        lines = "\n" * line + source  # so that an error names the page's own line
        with warnings.catch_warnings():
            exec(compile(lines, str(path), "exec"), code)


def test_most_pages_have_code():
    assert len(WITH_CODE) > 12


@cache
def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def wrong(command: str, benchmark) -> str:
    """What is wrong with a line of a shell block; empty if it names what exists."""
    words = [word for word in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=", word)]
    match words:
        case []:
            return ""
        case ["make", target]:
            return "" if target in targets() else "no such target"
        case ["python", "examples/benchmarks/run.py", *given]:
            benchmark.arguments(given)
            return ""
        case ["python" | ".venv/bin/python", script, *_]:
            return "" if (ROOT / script).is_file() else "no such file"
        case ["torchrun" | "accelerate", *given]:
            scripts = [word for word in given if word.endswith(".py")]
            return "" if scripts and (ROOT / scripts[0]).is_file() else "no such file"
        case [".venv/bin/pytest" | "pytest", *given]:
            missing = [name for name in given if "/" in name and not (ROOT / name).exists()]
            return f"there is no {missing}" if missing else ""
        case ["ras-compile", name, *given]:
            get_command(app).commands[name].make_context(name, given)  # an unknown option raises
            return ""
        case ["pip", "install", what]:
            extra = re.fullmatch(r"\.\[(\w+)\]", what)
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            return "" if extra and extra[1] in known else "no such extra"
    return "not known to this test"


@pytest.mark.parametrize("path", **named([path for path in [*PAGES, ROOT / "CONTRIBUTING.md"] if blocks(path, "sh")]))
def test_commands_name_what_exists(path):
    (benchmark,) = load(["benchmarks"], ["run"])
    lines = [line for _, source, _ in blocks(path, "sh") for line in source.splitlines()]
    commands = [command for line in lines for command in line.split(" && ")]
    assert not {command: wrong(command, benchmark) for command in commands if wrong(command, benchmark)}


def test_a_wrong_command_is_seen():
    assert wrong("make nothing", None) and wrong("python examples/nothing.py", None) and wrong("rm -r here", None)


def test_an_exception_needs_a_reason(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "*Not run by the tests: it needs a GPU.*\n\n```python\n1 / 0\n```\n\n*Not run.*\n\n```python\n2\n```\n"
    )
    assert [source for _, source, _ in blocks(page, "python")] == ["2\n"]
