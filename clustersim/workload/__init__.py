"""What must be computed: models, their parameters, and the kernels of every layer."""
