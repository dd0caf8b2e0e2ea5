"""Starts without compiling: what one process has compiled goes into a folder, and another process takes it from there.

The programs are PyTorch's own artefacts (`torch.compiler.save_cache_artifacts`); beside them stand what Dynamo captured of
the models (`capture/kept.py`), the graphs that the passes have made of that (`execute/shelf.py`), and what PyTorch leaves
out: the libraries into which Inductor has compiled their C++ on a CPU, and on a GPU the kernels of this package and the
libraries with which Triton launches any; what was measured of kernels; and a manifest that says what all of it is for. It
is read first, so that an artefact of another version, device or model is told in a sentence; even without it none would be
used, since PyTorch looks programs up by everything that they depend on. Of a model only its
class and the names, shapes and types of its weights count: other values need no other program.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import platform
import re
import sys
import time
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ras_compile.kernels
import ras_compile.passes
from ras_compile._torch import OptimizedModule, hash_compilers
from ras_compile.dispatch.kept import captures, give, use_loaded, weights_hash
from ras_compile.errors import ConfigError
from ras_compile.execute.shelf import shelf
from ras_compile.kernels._torch import cache_folder, compiled_by_triton, give_to_triton, launched_by_inductor
from ras_compile.kernels.tiles import is_answer, put, timings
from ras_compile.notices import warn_once
from ras_compile.sampling.models import modules_of, transformers_of

log = logging.getLogger(__name__)

MANIFEST = "ras_compile.json"
_FORMAT = 3
_ARTIFACTS = "artifacts"  # in the file of programs: PyTorch's; everything else is a library or a kernel
# A library below Inductor's folder; its name is a hash of its source.
_LIBRARY = re.compile(r"[a-z0-9]{2}/[a-z0-9]+(\.main)?\.so")
# A file below Triton's folder, in one that is named by a hash of what it depends on; its lists of files are written anew.
_KERNEL = re.compile(r"triton/([A-Z2-7]{52})/((?!__grp__)\w[\w.-]*\.(?:json|cubin|hsaco|so))")


def save(compiled: Any, folder: str | os.PathLike[str]) -> Path:
    """Write what this process has compiled into a folder, for :func:`load` in another process or on another machine like it.

    Call it after the pictures whose sizes, numbers of pictures and ratios are to start quickly. ::

        pipe(prompt)
        ras_compile.save(pipe, "start")

    The folder may be a part of a container image. Files are put in place whole, so that a process that reads them meanwhile
    finds the old ones or the new ones.

    Args:
        compiled: a pipeline, a handle of `attach`, or what `torch.compile` returned.
        folder: it is made if there is none; what another `save` has left there is replaced.

    Returns:
        The folder.

    Raises:
        ConfigError: nothing was compiled by Inductor in this process.
        TypeError: `compiled` is none of these.
        OSError: the folder cannot be written.
    """
    models = _models(compiled)
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        raise ConfigError(
            "save() writes what was compiled, and this process has compiled nothing with Inductor; draw a picture first."
        )
    kept = {f"captures/{_key(model)}/{name}": each for model in models for name, each in captures(model).items()}
    graphs = {f"graphs/{name}": content for name, content in shelf.all().items()}
    programs = _packed({_ARTIFACTS: saved[0], **libraries(), **kernels(), **kept, **graphs})
    place, digest = Path(folder), hashlib.sha256(programs).hexdigest()
    place.mkdir(parents=True, exist_ok=True)
    name = f"programs-{digest[:16]}.zip"
    device = _device(models)
    told = {
        "format": _FORMAT,
        **_surroundings(device),
        "models": [_fingerprint(model) for model in models],
        "programs": {"file": name, "sha256": digest},
        "timings": timings(device).known,
    }
    # other users may read them (a container's)
    put(place / name, programs, 0o644)
    put(place / MANIFEST, json.dumps(told, indent=1, sort_keys=True).encode(), 0o644)
    for old in place.glob("programs-*.zip"):
        if old.name != name:
            with contextlib.suppress(OSError):  # another process reads it, or has deleted it
                old.unlink()
    return place


def load(compiled: Any, folder: str | os.PathLike[str]) -> bool:
    """Take what :func:`save` wrote, so that the first picture compiles nothing; before it, beside `attach`. ::

        handle = ras_compile.attach(pipe)
        ras_compile.load(pipe, "start")

    What does not fit (another version, device or model, a file that is missing or damaged) is said in one warning and left
    alone; the first picture compiles then, and is right. Load only files that you trust, as they hold compiled code.

    Args:
        compiled: a pipeline, a handle of `attach`, or what `torch.compile` returned.
        folder: the folder that was given to `save`.

    Returns:
        Whether something was loaded.

    Raises:
        TypeError: `compiled` is none of these.
    """
    models, place, began = _models(compiled), Path(folder), time.perf_counter()
    device = _device(models)
    try:
        told = _manifest(place)
        programs = _programs(place, told)
        why = _misfit(told, device, models)
        if not why and torch.compiler.load_cache_artifacts(programs.pop(_ARTIFACTS)) is None:
            why = "PyTorch cannot read the programs in it"
        if not why:
            kept = {key: _taken(programs, f"captures/{key}/") for key in set(map(_key, models))}
            graphs, _ = _taken(programs, "graphs/"), _taken(programs, "captures/")
            _put_files(programs, device)
            shelf.load(graphs)
            for model in models:
                give(model, kept[_key(model)])
            if isinstance(compiled, OptimizedModule):
                use_loaded(compiled)
    except (OSError, ValueError, KeyError, RecursionError, zipfile.BadZipFile) as error:
        why = f"it cannot be read ({type(error).__name__}: {error})"
    if why:
        warn_once(
            f"ras_compile: nothing was loaded from {place}: {why}; the first picture compiles, and save() after it mends the folder"
        )
        return False
    hash_compilers()  # beside the capture, which comes first
    known = timings(device)
    known.learn(told["timings"])
    log.info("loaded programs from %s in %.1f s", place, time.perf_counter() - began)
    return True


def _models(compiled: Any) -> list[nn.Module]:
    """The transformers of a pipeline, or those behind what `modules_of` takes."""
    found = [] if isinstance(compiled, nn.Module) else list(transformers_of(compiled).values())
    return found or modules_of(compiled)


def _device(models: list[nn.Module]) -> torch.device:
    """Where the models run: the device of their weights, or the GPU, if offloading keeps them elsewhere until they run."""
    devices = {tensor.device.type: tensor.device for model in models for tensor in model.parameters()}
    if "cuda" in devices:
        return devices["cuda"]
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _surroundings(device: torch.device) -> dict[str, str]:
    """Everything beside the model that compiled programs depend on, in words."""
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"
    cuda = device.type == "cuda"
    words = [torch.cuda.get_device_name(device)] if cuda else ["CPU", platform.machine()]
    words += map(str, torch.cuda.get_device_capability(device)) if cuda else [torch.backends.cpu.get_cpu_capability()]
    return {
        "ras_compile": importlib.metadata.version("ras_compile"),
        "torch": torch.__version__,
        "triton": triton,
        "python": ".".join(map(str, sys.version_info[:2])),
        "code": _own_files(),
        "device": " ".join(words),
    }


@cache
def _own_files() -> str:
    """A hash of this package's files: what other passes made of a graph is another program."""
    digest = hashlib.sha256()
    modules = (ras_compile, ras_compile.kernels, ras_compile.passes)
    for folder in sorted({Path(module.__file__ or "").parent for module in modules}):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _fingerprint(model: nn.Module) -> dict[str, str]:
    """A model's class, and a hash of the names, types and shapes of its weights."""
    kind = type(model)
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "weights": weights_hash(model)}


def _key(model: nn.Module) -> str:
    """A name for what :func:`_fingerprint` says."""
    return hashlib.sha256(json.dumps(_fingerprint(model), sort_keys=True).encode()).hexdigest()[:16]


def _taken(programs: dict[str, bytes], place: str) -> dict[str, bytes]:
    """Takes the files of one place out of all, by their names there."""
    names = [name for name in programs if name.startswith(place)]
    return {name.removeprefix(place): programs.pop(name) for name in names}


def _manifest(place: Path) -> dict[str, Any]:
    """What the manifest says.

    Raises:
        OSError: there is none.
        ValueError: it is none of ours.
    """
    told = json.loads((place / MANIFEST).read_text())
    if not isinstance(told, dict) or told.get("format") != _FORMAT:
        raise ValueError(f"{MANIFEST} is no manifest of this version of ras_compile")
    known = told.get("timings")
    if not isinstance(known, dict) or not all(map(is_answer, known.values())):
        raise ValueError(f"{MANIFEST} holds no timings of kernels")
    return told


def _programs(place: Path, told: dict[str, Any]) -> dict[str, bytes]:
    """What is in the file of programs that a manifest names: the artefacts, and libraries by their places.

    Raises:
        OSError: there is none.
        ValueError: it is not what was saved.
    """
    named: dict[str, Any] = told["programs"] if isinstance(told.get("programs"), dict) else {}
    file = named.get("file")
    if not isinstance(file, str) or Path(file).name != file:
        raise ValueError(f"{MANIFEST} names no file of programs")
    programs = (place / file).read_bytes()
    if hashlib.sha256(programs).hexdigest() != named.get("sha256"):
        raise ValueError(f"{file} is not what was saved")
    with zipfile.ZipFile(io.BytesIO(programs)) as packed:
        try:
            return {name: packed.read(name) for name in packed.namelist()}
        except RuntimeError as error:  # a zip that is encrypted, or compressed in a way that Python does not know
            raise ValueError(str(error)) from error


def _packed(files: dict[str, bytes]) -> bytes:
    """One archive of some files, the same bytes for the same files."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for name in sorted(files):
            packed.writestr(zipfile.ZipInfo(name), files[name], zipfile.ZIP_DEFLATED)
    return whole.getvalue()


def libraries() -> dict[str, bytes]:
    """What Inductor's C++ was compiled to: libraries that this process runs, and those with which it looked at the compiler."""
    root, running = cache_folder(), _running()
    found = {path.relative_to(root).as_posix(): path for path in root.glob("??/*.so")} if running else {}
    wanted = {name: path for name, path in found.items() if ".main." not in name or str(path) in running}
    return {name: path.read_bytes() for name, path in wanted.items() if _LIBRARY.fullmatch(name)}


def kernels() -> dict[str, bytes]:
    """What Triton has compiled of this package's kernels, and the libraries of its own with which this process launches any."""
    if not torch.cuda.is_available():
        return {}
    files = {*compiled_by_triton(), *launched_by_inductor(), *map(Path, _running())}
    named = {f"triton/{path.parent.name}/{path.name}": path for path in files if path.exists()}
    return {name: path.read_bytes() for name, path in named.items() if _KERNEL.fullmatch(name)}


def _running() -> set[str]:
    """The files that are mapped into this process, such as libraries."""
    try:
        return {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    except OSError:  # a system without it: libraries are compiled anew, and programs are found all the same
        return set()


def _put_files(files: dict[str, bytes], device: torch.device) -> None:
    """Puts libraries and kernels where Inductor and Triton look for them.

    Raises:
        OSError: a folder of theirs cannot be written.
        ValueError: something among them is neither.
    """
    kernels: dict[str, dict[str, bytes]] = {}
    for name, content in files.items():
        if kernel := _KERNEL.fullmatch(name):
            kernels.setdefault(kernel[1], {})[kernel[2]] = content
        elif not _LIBRARY.fullmatch(name):
            raise ValueError(f"{name} is neither a library of Inductor's nor a kernel")
        elif not (path := cache_folder() / name).exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            put(path, content, 0o755)
    for folder, held in kernels.items():
        give_to_triton(folder, held, device.index or 0)


def _misfit(told: dict[str, Any], device: torch.device, models: list[nn.Module]) -> str:
    """What a manifest is for that is not so here; empty where all fits."""
    for name, here in _surroundings(device).items():
        if told.get(name) != here:
            return f"it is for {name} {told.get(name)}, and this is {here}"
    saved = told.get("models")
    for model in models:
        own = _fingerprint(model)
        if not isinstance(saved, list) or own not in saved:
            alike = isinstance(saved, list) and any(
                isinstance(known, dict) and known.get("class") == own["class"] for known in saved
            )
            what = "other weights (names, types or shapes)" if alike else "another model"
            return f"it is for {what} than this {type(model).__name__}"
    return ""
