"""What takes minutes comes first, so that at the end no process is left alone with it; xdist has to keep the order."""

import gc

LONGEST = ("tests/test_", "tests/bench/worlds/", "tests/bench/validation/")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


def pytest_collection_finish():
    """What imports have left stays for ever: no collection of garbage need go through its millions of objects."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or the bindings of Triton say at the end what was never freed
