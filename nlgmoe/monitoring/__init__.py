"""Measuring and logging for callbacks: routing statistics, step time, memory, heat maps, loggers, peak rates of GPUs."""
