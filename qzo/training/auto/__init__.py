"""Settings that need no expert: layers by the kind of data, the rest by forward passes before the first step."""
