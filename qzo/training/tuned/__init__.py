"""What a run made of its model: read, exported, and taken wherever a model is."""
