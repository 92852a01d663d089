"""Grain, which reads, shuffles and batches: optional, so asked for with a hint."""

try:
    import grain as grain
except ImportError as error:
    raise ImportError(
        f"pararnn.training needs grain, which could not be imported ({error}). "
        "Likely cause: the extra is not installed: `pip install 'pararnn[train]'`."
    ) from error
