"""`qzo report RUN`: a run as one offline HTML page, and its curves as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qzo.commands import data
from qzo.commands.moved import add_moved
from qzo.errors import QzoError, printable

PAGE, CURVES = "report.html", "curves.png"


def add_command(commands: Any) -> None:
    """Add `report` to the subcommands of a parser."""
    parser = commands.add_parser("report", help="show a run as one HTML page, and its curves as a picture")
    parser.add_argument("run_folder", metavar="RUN", help="folder of qzo train, of a run that goes on too")
    parser.add_argument("--out", metavar="PAGE.html", help=f"the page (default RUN/{PAGE}); {CURVES} is put beside it")
    parser.add_argument(
        "--examples", type=int, metavar="N", help="answer N validation rows before and after training, by both models"
    )
    add_moved(parser)
    parser.add_argument("--device", default="cpu", help="for --examples: where to run the models (default cpu)")
    parser.add_argument("--no-peaks", action="store_true", help="do not simulate what other methods would have needed")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Make all of it, then write both files, or neither."""
    from qzo.output import check_output
    from qzo.report.curves import panels_of
    from qzo.report.examples import check_examples, examples_of
    from qzo.report.page import page
    from qzo.report.peaks import measured, simulated
    from qzo.report.picture import curves_png, is_drawable
    from qzo.report.reading import read_story
    from qzo.report.writing import write_both
    from qzo.training.telemetry.progress import tell

    folder = Path(options.run_folder)
    out = Path(options.out or folder / PAGE)
    story = read_story(folder)
    for file in (out, out.with_name(CURVES)):
        check_output(file, "--out")
    if out.name == CURVES:
        raise QzoError(f"--out {out} is the name of the picture; name the page otherwise, e.g. {PAGE}")
    check_examples(options.examples, folder, story)
    device = data.device(options.device)
    answers = examples_of(story, options.examples, options.moved, device, tell) if options.examples else []
    panels = panels_of(story)
    title = f"{folder.absolute().name}: {story.method}, {story.taken:,} steps"
    picture = curves_png(panels, title, story.passes_a_step, story.passes) if is_drawable() else None
    others, missing = ([], "not simulated, as --no-peaks asked") if options.no_peaks else simulated(story, tell)
    write_both(out, page(story, panels, [*measured(story), *others], missing, answers), picture, CURVES)
    print(printable(f"{out} shows the run" + ("" if picture is None else f", {out.with_name(CURVES)} its curves")))
    if picture is None:
        tell(f"notice: {CURVES} was not made: that needs matplotlib; run: pip install matplotlib")
