"""Arguments and options that several verbs share, each with its help text."""

from pathlib import Path
from typing import Annotated

import typer

Base = Annotated[str, typer.Argument(help="The checkpoint before tuning: a folder, file or hub id.")]
Tuned = Annotated[str, typer.Argument(help="The checkpoint or adapter after tuning.")]
Edited = Annotated[str, typer.Argument(help="The checkpoint to edit: a folder, file or hub id.")]
Donor = Annotated[str, typer.Argument(help="The checkpoint or adapter that the new weights come from.")]

# How a source is read.
Preset = Annotated[
    str | None, typer.Option(help="Known source of a file that holds trained tensors only, e.g. affectgpt.")
]
_LORA_ALPHA = "LoRA's alpha, if no file states it."
Alpha = Annotated[float | None, typer.Option(help=_LORA_ALPHA)]
LoraAlpha = Annotated[float | None, typer.Option(help=_LORA_ALPHA)]
Dtype = Annotated[str, typer.Option(help="dtype of the live model; auto keeps the stored one.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps, …; by default AFFECTLENS_DEVICE, else cpu."),
]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Most examples in one pass; halved where memory runs out.")
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the code that comes with the model: only if you trust its author."
    ),
]

# Which sites.
Roles = Annotated[
    list[str] | None,
    typer.Option("--role", help="A role such as gate_proj, or mlp or attention; may be repeated."),
]
Towers = Annotated[
    list[str] | None, typer.Option("--tower", help="language, vision, audio, …; may be repeated.")
]
Layers = Annotated[str | None, typer.Option(help="Layers and ranges with both ends, e.g. 10-19,23.")]

# What a sweep changes.
By = Annotated[str, typer.Option(help="Group by site, role, layer or tower, or by several: role,layer.")]
Actions = Annotated[str, typer.Option(help="Any of transplant, revert and zero, with commas between.")]

# What a study compares and judges by.
Control = Annotated[str | None, typer.Option(help="Another tuning of BASE, on something other than affect.")]
Tasks = Annotated[
    list[str],
    typer.Option(
        "--task",
        help="[NAME:]KIND=FILE.jsonl, where KIND is emotion-labels, valence or labels; may be repeated.",
    ),
]
ControlTasks = Annotated[
    list[str] | None,
    typer.Option("--control-task", help="The same for a task that the control was tuned on."),
]
PromptOf = Annotated[
    str, typer.Option(help="Whose chat template asks all models: base or tuned, a folder or hub id.")
]
Cue = Annotated[
    str, typer.Option(help="Text behind every prompt, e.g. $'\\n</think>\\n\\n' to close a thought in bash.")
]
Draws = Annotated[int, typer.Option(help="Number of draws of the layer-stratified null.")]
Seed = Annotated[int, typer.Option(help="Seed of the draws.")]
Workers = Annotated[
    int, typer.Option(min=0, help="Number of worker processes; 0 runs all models in this process.")
]

# Where results go.
Folder = Annotated[Path, typer.Option(help="Folder for the tables and the report.")]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Save the table here, as .parquet, .csv, .json, .md or .tex."),
]
Out = Annotated[Path, typer.Option("-o", "--out", help="The new folder.")]
Link = Annotated[
    bool,
    typer.Option(
        "--link",
        help="Hard-link unchanged files instead of copying them: an edit of one is then an edit of both.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the record of the edit as JSON.")]
