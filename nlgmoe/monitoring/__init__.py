"""What callbacks measure with: routing statistics, a stopwatch, memory, heat maps, load files, loggers, peak rates of devices."""
