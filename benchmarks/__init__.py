"""Side-by-side timings, one command each, a table and a JSON."""
