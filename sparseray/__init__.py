"""sparseray: elastic training and serving of sparse language models on Ray."""

__version__ = "0.1.0"
