"""A page to draw with: the picture as it is made, where it was computed, and plain steps in the same time beside it.

    pip install '.[app]'
    python examples/app.py                  # with the model that this repository ships
    python examples/app.py --pipeline DIR   # with one of your own

It takes some seconds to start, with --help too: PyTorch, diffusers and Gradio are imported first.
The third picture is what fewer steps of DPM-Solver++ make of the same noise in the time that the first one took.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from diffusers import DiffusionPipeline
from studio import LEAST, MOST, PRESETS, Studio

SHIPPED = Path(__file__).parent / "emoji" / "pipeline"
# small pictures fill their frames, so that the three can be compared
STYLE = ".image-frame img {width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated}"
FONT = ["system-ui", "sans-serif"]  # the page asks no other host for its letters


def page(studio: Studio) -> gr.Blocks:
    """The page. One picture is drawn at a time, since a scheduler counts the steps of one run."""
    buttons = ["download", "fullscreen"]
    with gr.Blocks(title="Region-adaptive sampling", analytics_enabled=False) as blocks:
        gr.Markdown("# Region-adaptive sampling\nAfter a few full steps, each step computes only what changes.")
        with gr.Row():
            prompt = gr.Textbox("a cat to the left of a tree", label="Prompt", scale=4, min_width=240, max_lines=3)
            draw = gr.Button("Draw", variant="primary", min_width=120)
        with gr.Row():
            steps = gr.Slider(LEAST, MOST, 28, step=1, label="Steps", min_width=200)
            preset = gr.Dropdown(PRESETS, value="balanced", label="Preset", min_width=160)
            seed = gr.Number(0, label="Seed", precision=0, min_width=100)
        with gr.Row():
            titles = ("Region-adaptive", "Where: white most often", "Plain steps in the same time")
            shown = [gr.Image(label=title, height=320, min_width=240, buttons=buttons) for title in titles]
        told = gr.Markdown("The first picture takes longer: it compiles.", elem_id="told")
        inputs, outputs = [prompt, steps, preset, seed], [*shown, told]
        gr.on([draw.click, prompt.submit], studio.draw, inputs, outputs, concurrency_limit=1, show_progress="hidden")
    return blocks


def load(folder: str | Path) -> Any:
    """A pipeline on the GPU, if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def main(argv: Sequence[str] | None = None, **launch: Any) -> gr.Blocks:
    """Serves the page, until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pipeline", help="folder or name of a text-to-image pipeline")
    parser.add_argument("--inner-backend", default="inductor", help="eager compiles nothing, to look at it at once")
    parser.add_argument("--port", type=int, help="7860 or the next free one unless told otherwise")
    args = parser.parse_args(argv)
    inputs = {} if args.pipeline else {"max_sequence_length": 1}  # the shipped model's T5 is an empty chair
    blocks = page(Studio(load(args.pipeline or SHIPPED), inputs, inner_backend=args.inner_backend))
    blocks.launch(server_port=args.port, theme=gr.themes.Default(font=FONT, font_mono=FONT), css=STYLE, **launch)
    return blocks


if __name__ == "__main__":
    main()
