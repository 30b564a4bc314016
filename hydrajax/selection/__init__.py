"""Head selection: teacher → scores → heads.json. `python -m hydrajax.selection --help`."""
