"""What takes minutes comes first, so that at the end no process is left alone with it."""

LONGEST = ("tests/test_cpu_levels.py", "tests/bench/worlds/", "tests/bench/validation/")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
