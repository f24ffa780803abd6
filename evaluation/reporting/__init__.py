"""What a run found, as a table, plots and two files to read."""
