"""Time to a given FVE: the same training by several programs, evaluated by one (`benchmarks.time_to_fve`)."""
