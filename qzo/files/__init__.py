"""The files of a model: where they are, what they may be, what they are called, and what their settings say."""
