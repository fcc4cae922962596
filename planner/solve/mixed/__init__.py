"""The search of mixed clusters: pipelines whose stages run on different node groups."""
