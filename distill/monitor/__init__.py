"""What is said and kept while a run goes: scalars, records, progress, and what it ran on."""
