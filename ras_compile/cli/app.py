"""The commands. What they tell goes to standard output, as tables or with `--json` as data; progress goes to standard error.

Exit codes: 0, all is well; 1, it cannot be done, and one sentence says what to do; 2, the command was not understood.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import ras_compile
from ras_compile.cli.doctor import examine
from ras_compile.cli.drawing import Artist, as_tensor, load, named, nearest, settings
from ras_compile.cli.frontier import frontier, page, table
from ras_compile.cli.measures import clip_score, image_reward, psnr
from ras_compile.config import PRESETS
from ras_compile.errors import ConfigError, RASError
from ras_compile.report.pictures import frames_of, save
from ras_compile.report.run import finite
from ras_compile.report.run import load as load_run
from ras_compile.report.write import checked, write

DEMO = Path(__file__).resolve().parents[2] / "examples" / "emoji" / "pipeline"


class _Group(typer.core.TyperGroup):
    """Says which command is meant where one is written wrongly."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            commands = self.list_commands(ctx)
            ctx.fail(f"there is no command {args[0]!r}{nearest(args[0], commands)} Commands: {', '.join(commands)}.")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="ras-compile",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Region-adaptive sampling for diffusion transformers: try it, see where it computes, measure it on your own weights.",
)
_progress = Console(stderr=True)
# Defaults of options that may be repeated; typer reads them and never writes.
_NONE: list[str] = []
_BENCHED = list(PRESETS)
_WRITTEN = ("dense", "ras", "report", "focus")
_EVALUATED = ["fast", "balanced", "quality"]

Folder = Annotated[Path, typer.Argument(help="a folder that pipe.save_pretrained(folder) wrote")]
AsJson = Annotated[bool, typer.Option("--json", help="print data instead of a table")]
Steps = Annotated[int, typer.Option(min=1, help="steps of a picture")]
Preset = Annotated[str, typer.Option(help=f"one of {', '.join(PRESETS)}")]
Presets = Annotated[list[str], typer.Option("--preset", help=f"may be repeated; of {', '.join(PRESETS)}")]
Set = Annotated[
    list[str], typer.Option("--set", help="a further argument of the pipeline, as name=value; may be repeated")
]
Height = Annotated[int | None, typer.Option(min=1, help="of the picture, in pixels")]
Width = Annotated[int | None, typer.Option(min=1, help="of the picture, in pixels")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; by default the GPU, if there is one")]
Seed = Annotated[int, typer.Option(help="of the noise")]
Backend = Annotated[str, typer.Option(help="what compiles programs; eager runs them as they are")]
Output = Annotated[Path, typer.Option(help="folder to write to; it is made")]


def _in_a_sentence(command: Callable[..., None]) -> Callable[..., None]:
    """Ends with exit code 1 and the sentence where something cannot be done."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except torch.OutOfMemoryError:
            text = "the GPU's memory is full; give a smaller --height and --width, or another --device."
        except (RASError, TypeError, ValueError, OSError) as error:  # the latter of the pipeline, and of files
            text = str(error)
        else:
            return
        print(f"ras-compile: {text}", file=sys.stderr)
        raise typer.Exit(1)

    return run


def _show(lines: list[list[str]], title: str = "") -> None:
    """A table with its head."""
    shown = Table(*lines[0], title=title or None, title_justify="left", box=None, pad_edge=False)
    for line in lines[1:]:
        shown.add_row(*line)
    Console().print(shown, markup=False)


@contextmanager
def _drawing(
    folder: Path, device: str | None, seed: int, backend: str, given: dict[str, Any], more: list[str]
) -> Iterator[Artist]:
    """An attached pipeline from a folder."""
    extra = named(more)
    with _progress.status("loading the pipeline"):
        pipe = load(folder, device)
    artist = Artist(pipe, settings(pipe, given, extra), seed, {"inner_backend": backend})
    try:
        yield artist
    finally:
        artist.close()


def _version(asked: bool) -> None:
    if asked:
        print(f"ras-compile {ras_compile.__version__}")
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="tell it, and end")
    ] = False,
) -> None:
    pass


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look at this machine: versions, GPU, compilers, and what to do."""
    found = examine()
    if as_json:
        print(json.dumps([vars(finding) for finding in found], indent=1))
    else:
        _show([["", "found", "", "to do"], *([f.what, f.found, f.state, f.advice] for f in found)])
    raise typer.Exit(int(any(finding.state == "bad" for finding in found)))


@app.command()
@_in_a_sentence
def explain(
    model: Annotated[str, typer.Argument(help="a pipeline's folder, or the name of one of diffusers' classes")],
    prompt: Annotated[str, typer.Option(help="of the call that is looked at")] = "a red apple",
    steps: Steps = 28, preset: Preset = "balanced", height: Height = None, width: Width = None,
    more: Set = _NONE, device: Device = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Say what would be skipped, what that saves, and what it costs in memory; no picture is drawn."""
    if model.isidentifier() and not Path(model).is_dir():
        text, works = _of_class(model)
        print(json.dumps({"class": model, "works": works, "text": text}) if as_json else text)
        raise typer.Exit(int(not works))
    extra = named(more)
    with _progress.status("loading the pipeline"):
        pipe = load(Path(model), device)
    given = {"prompt": prompt, "height": height, "width": width, "num_inference_steps": steps}
    told = ras_compile.explain(pipe, options={"preset": _preset(preset)}, **settings(pipe, given, extra))
    if as_json:
        data = {"supported": told.supported, "reason": told.reason, "tokens": told.tokens, "grid": told.grid}
        saved = told.speedup(num_steps=steps) if told.supported else None
        print(json.dumps({**data, "flop_speedup": saved, "cache_bytes": told.cache_bytes, "words": told.words}))
    else:
        print(told)
    raise typer.Exit(int(not told.supported))


def _of_class(name: str) -> tuple[str, bool]:
    """What can be said of a class of diffusers without its weights, and whether it denoises with a transformer."""
    import inspect

    import diffusers

    known = [entry for entry in dir(diffusers) if entry.endswith(("Pipeline", "Model", "Model2D", "Model3D"))]
    found = getattr(diffusers, name, None)
    if not isinstance(found, type):
        raise ConfigError(f"{name!r} is neither a folder nor a class of diffusers{nearest(name, known)}")
    parts = inspect.signature(found).parameters
    if "transformer" in parts or "Transformer" in name:
        what = "denoises with" if "transformer" in parts else "is"
        return (
            f"{name} {what} a transformer, which can be sampled region-adaptively if "
            "its graph can be proved right; give a folder with its weights, and explain proves it and tells what is saved."
        ), True
    other = "a UNet" if "unet" in parts else "no transformer"
    return f"{name} denoises with {other}, and region-adaptive sampling takes diffusion transformers alone.", False


def _preset(name: str) -> str:
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}{nearest(name, PRESETS)} Presets: {', '.join(PRESETS)}.")
    return name


def _folder(output: Path) -> None:
    """Makes it before anything is drawn, so that no picture is lost where it cannot be made."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"no folder {str(output)!r} can be made ({error.strerror}); give another --output.") from None


@app.command()
@_in_a_sentence
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="what to draw")],
    preset: Preset = "balanced", steps: Steps = 28, seed: Seed = 0, height: Height = None, width: Width = None,
    more: Set = _NONE, device: Device = None, backend: Backend = "inductor", output: Output = Path("ras_output"),
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Draw a prompt dense and region-adaptively from the same noise: both pictures, seconds, PSNR, and a report."""
    given = {"prompt": prompt, "height": height, "width": width}
    _preset(preset)
    _folder(output)
    with _drawing(folder, device, seed, backend, given, more) as artist:
        with _progress.status("drawing with all steps dense"):
            dense = artist.dense(steps)
        with _progress.status(f"drawing with the preset {preset}"):
            drawn = artist.adaptive(steps, preset)
        written = [
            save(frames_of(one.picture, one.video), output / name) for name, one in (("dense", dense), ("ras", drawn))
        ]
        written += [
            artist.handle.report(output / name, image=drawn.picture, dense=dense.picture, prompt=prompt)
            for name in ("report.html", "focus.png")
        ]
    near = psnr(as_tensor(drawn.picture, drawn.video), as_tensor(dense.picture, dense.video))
    data = {
        "preset": preset, "steps": steps, "dense_seconds": dense.seconds, "seconds": drawn.seconds,
        "speedup": dense.seconds / drawn.seconds if drawn.seconds else None, "flop_speedup": drawn.summary.flop_speedup,
        "psnr": finite(near), "summary": str(drawn.summary), **dict(zip(_WRITTEN, map(str, written), strict=True)),
    }  # fmt: skip
    if as_json:
        print(json.dumps(data))
        return
    head = ["", "seconds", "speed-up", "by FLOPs", "PSNR to dense"]
    ratio = f"{dense.seconds / drawn.seconds:.2f}x" if drawn.seconds else ""
    flops = "" if data["flop_speedup"] is None else f"{data['flop_speedup']:.2f}x"
    _show([head, ["dense", f"{dense.seconds:.3g}"], [preset, f"{drawn.seconds:.3g}", ratio, flops, f"{near:.1f} dB"]])
    print(f"\n{drawn.summary}\n\nwritten to {output}: {', '.join(path.name for path in written)}")


@app.command()
@_in_a_sentence
def demo(
    steps: Steps = 28, preset: Preset = "balanced", backend: Backend = "inductor", output: Output = Path("demo_output"),
) -> None:  # fmt: skip
    """Draw with the small model that the repository ships."""
    if not DEMO.is_dir():
        raise ConfigError(
            "the small model stands in the repository, not in the installed package: clone it and run the command there, or "
            "give a pipeline of your own to `ras-compile generate`."
        )
    more = ["max_sequence_length=1", "guidance_scale=4.0"]
    generate(
        DEMO, "a cat to the left of a tree", preset=preset, steps=steps, height=128, width=128, more=more, backend=backend,
        output=output,
    )  # fmt: skip


@app.command()
@_in_a_sentence
def bench(
    folder: Folder,
    prompt: Annotated[str, typer.Option(help="what to draw")] = "a red apple",
    presets: Presets = _BENCHED, steps: Steps = 28, turns: Annotated[int, typer.Option(min=1, help="runs of each way")] = 3,
    seed: Seed = 0, height: Height = None, width: Width = None, more: Set = _NONE, device: Device = None,
    backend: Backend = "inductor", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Time presets beside dense steps. After a run of each, which compiles, they take turns; medians are told."""
    from statistics import median

    for preset in presets:
        _preset(preset)
    ways: list[str | None] = [None, *presets]
    times: dict[str | None, list[float]] = {way: [] for way in ways}
    saved: dict[str | None, float | None] = {}
    with _drawing(folder, device, seed, backend, {"prompt": prompt, "height": height, "width": width}, more) as artist:
        for turn in range(turns + 1):
            for way in ways:
                with _progress.status(f"{way or 'dense'}, {'compiling' if not turn else f'run {turn} of {turns}'}"):
                    drawn = artist.dense(steps) if way is None else artist.adaptive(steps, way)
                saved[way] = drawn.summary.flop_speedup
                if turn:
                    times[way].append(drawn.seconds)
    told = {way or "dense": median(found) for way, found in times.items()}
    ratios = {name: told["dense"] / seconds for name, seconds in told.items()}
    flops = {way or "dense": ratio for way, ratio in saved.items()}
    if as_json:
        rows = [{"way": n, "seconds": s, "speedup": ratios[n], "flop_speedup": flops[n]} for n, s in told.items()]
        print(json.dumps(rows))
        return
    cells = [[n, f"{s:.3g}", f"{ratios[n]:.2f}x", f"{flops[n]:.2f}x" if flops[n] else ""] for n, s in told.items()]
    _show([["way", "seconds", "by the clock", "by FLOPs"], *cells])


@app.command()
@_in_a_sentence
def report(
    run: Annotated[Path, typer.Argument(help="the file that handle.report('run.json') wrote")],
    output: Annotated[Path, typer.Argument(help="what to make of it: a name that ends in .html, .png or .gif")],
) -> None:
    """Make a page, a picture or an animation of a run that was saved as JSON."""
    found = checked(output)
    write(load_run(run), found)
    print(found)


@app.command()
@_in_a_sentence
def evaluate(
    folder: Folder,
    prompts: Annotated[Path, typer.Argument(help="a text file, one prompt a line")],
    presets: Presets = _EVALUATED,
    steps: Steps = 28,
    exact_steps: Annotated[int, typer.Option(min=1, help="dense steps of the picture that counts as exact")] = 112,
    height: Height = None, width: Width = None, more: Set = _NONE, device: Device = None, backend: Backend = "inductor",
    clip: Annotated[Path | None, typer.Option(help="a folder with a CLIP model, to tell CLIPScore")] = None,
    reward: Annotated[
        Path | None, typer.Option("--image-reward", help="a folder with ImageReward.pt and med_config.json")
    ] = None,
    output: Output = Path("ras_output"), as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measure presets on your own weights, beside plain steps and DPM-Solver++ that take the same time."""
    for preset in presets:
        _preset(preset)
    try:
        lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{prompts} cannot be read; give a text file (UTF-8) with one prompt a line.") from None
    if not lines:
        raise ConfigError(f"{prompts} holds no prompt; write one a line.")
    asked = {"clip": (clip_score, clip), "image_reward": (image_reward, reward)}
    judges = {name: judge(where) for name, (judge, where) in asked.items() if where is not None}
    given = {"prompt": lines[0], "height": height, "width": width}
    _folder(output)
    with _drawing(folder, device, 0, backend, given, more) as artist, _progress.status("drawing") as status:
        tell = status.update if _progress.is_terminal else _progress.print  # a file gets a line for each picture
        drawn = frontier(artist, lines, presets, steps, exact_steps, judges, lambda said: tell(f"drew {said}"))
    found = output / "evaluation.html"
    found.write_text(page(drawn), encoding="utf-8")
    (output / "evaluation.json").write_text(json.dumps(drawn.told(), indent=1))
    if as_json:
        print(json.dumps({**drawn.told(), "page": str(found)}))
        return
    _show(
        table(drawn.rows),
        f"to the picture of {exact_steps} dense steps from the same noise; prompts: {len(lines)}, means over them",
    )
    print("\n".join(["", *drawn.verdicts, *drawn.notes, "", f"written to {output}: {found.name}, evaluation.json"]))
