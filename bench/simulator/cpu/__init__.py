"""CPUs: what their kernels allocate, and how they multiply in bf16."""
