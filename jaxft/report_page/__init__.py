"""HTML pages: of a run (report.html), of several runs compared, and of plans."""
