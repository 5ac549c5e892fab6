"""A teacher behind HTTP: `python -m teacher.serve --model DIR`."""
