"""Other systems, planning and reports. No module outside this folder imports it, but for the command line's table."""
