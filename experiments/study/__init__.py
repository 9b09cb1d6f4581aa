"""The machinery of studies: definitions, trials, storage, workers, statistics and reports."""
