"""Where training rows come from: files (json_files, tables), row formats, and their pictures."""
