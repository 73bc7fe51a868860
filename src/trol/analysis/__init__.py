"""Pictures and reports, made from arrays, traces and result files only."""
