"""What an editable install has beside the wheel: the bench and the reports, which are run from a checkout.

Their folders lie at the top of the repository and import each other by these names, which are too common to be put into
a site-packages that others use. So a wheel holds `qzo` alone, and `make setup` has all of it. The rest is in
pyproject.toml.
"""

import sys

from setuptools import find_packages, setup

SCRIPTS = ["qzo = qzo.commands.main:main"]
FROM_A_CHECKOUT = "editable_wheel" in sys.argv  # what pip asks setuptools for

if FROM_A_CHECKOUT:
    setup(
        packages=find_packages(include=["qzo*", "bench*", "reports*"]),
        entry_points={
            "console_scripts": [*SCRIPTS, "qzo-bench = bench.__main__:main"],
            "pytest11": ["qzo-memory = bench.pytest_plugin"],
            "qzo.peaks": ["bench = bench.commands.peaks:peaks"],
        },
    )
else:
    setup(packages=find_packages(include=["qzo*"]), entry_points={"console_scripts": SCRIPTS})
