"""report.html: one page of a run, or of several compared."""
