"""Pages of runs: what a workdir tells (record), drawn (charts) and put into one HTML file (run, comparison)."""
