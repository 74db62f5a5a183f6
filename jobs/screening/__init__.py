"""The parts of the screening stage; `jobs.screen.screen` puts them together."""
