"""One self-contained HTML page rendered from run records alone: no model, no GPU, nothing fetched."""
