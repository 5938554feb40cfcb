"""The sections of the page, one file a kind; each is None, or says so, where a run has nothing to show in it."""
