"""The report of a run: its numbers (`model`), the rows they make (`views`), their renderers (`terminal`, `html`)."""
