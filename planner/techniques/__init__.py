"""One technique, one file: every module here ends in a `TECHNIQUE` record."""
