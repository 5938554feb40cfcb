"""Which decoder layers to train where nobody names any."""

from __future__ import annotations

FEWEST = 4  # decoder layers that are worth choosing from


def chosen_layers(count: int, chooses: bool) -> str | None:
    """The range, FIRST-LAST, that a model of `count` decoder layers is trained in; None, all of them.

    The upper half: a step that leaves the lower half alone computes it once for all its evaluations, and a number of
    the upper half is worth more, as what all scales together add to the curvature is noise. Where answers are chosen
    among the words of labels (`chooses`), the last quarter is left out too: it moves what the model says before it has
    read the text, and hardly what it makes of it. Measured in reports/studies/accuracy/settings.md.
    """
    if count < FEWEST:
        return None
    last = count * 3 // 4 if chooses else count
    return f"{count // 2}-{last - 1}"
