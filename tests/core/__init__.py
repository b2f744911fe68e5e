"""The core, part by part, from the bottom up; one file per part, named after it."""
